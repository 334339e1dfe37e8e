"""Keys and values that one mesh has read and another goes on after: every bit, and every answer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models
from children import run
from jax.sharding import NamedSharding
from test_answers import CONFIG, PART, begin

from qwen_jax import cache as caches
from qwen_jax import params, session, sharding, transfer
from qwen_jax.engine.engine import EngineConfig, Piece
from qwen_jax.engine.replicas import build
from qwen_jax.engine.request import Request
from qwen_jax.session import Identity, Writer

# Without temperature, which depends on the length of the whole prompt.
MODEL = dataclasses.replace(CONFIG, original_len=0)
LENGTHS = 203, 97, 64, 5  # tokens of sessions: chunks of 64 end within them, at their end, nowhere
QUESTION = 3, 1, 4, 1, 5
EIGHT = "seq=4,tensor=2"


def mesh_of(text):
    shape = sharding.parse(text)
    return sharding.make_mesh(jax.devices()[: shape.size], **dataclasses.asdict(shape))


def engine(text):
    """An engine of a random model on a mesh, or on one device."""
    tree, seq = random_models.weights(MODEL), 1
    if text:
        mesh = mesh_of(text)
        tree, seq = jax.device_put(tree, params.shardings(MODEL, mesh)), mesh.shape["seq"]
    else:
        tree = jax.device_put(tree, jax.devices()[0])
    return build(MODEL, tree, EngineConfig(max_len=256, held=203, page=PART * seq, slices=(48,)))


def keep(directory, engine, prompt, every):
    """Saves what an engine reads of a prompt, after so many tokens or more at a time."""
    identity = Identity(
        weights="",
        tokenizer="",
        settings={"dca": None, "dca_original": 0, "sparse": None},
        dtype="float32",
        shape=(MODEL.num_layers, MODEL.num_kv_heads, MODEL.head_dim),
        num_tokens=len(prompt),
        tokens_sha256="",
        is_chat=False,
    )
    with Writer(directory, identity, prompt, documents=(), versions={}) as writer:
        number, read = engine.add(Request(prompt=prompt, max_new_tokens=2)), 0
        while writer.session.saved < len(prompt):
            if read < len(prompt):
                (event,) = engine.step()
                read = event.prefilled
            saved = writer.session.saved
            if read - saved >= every or read == len(prompt):
                writer.add(read, *engine.take(number, saved, read))
    engine.cancel(number)
    engine.step()


def restored(directory, text, prompt):
    """An engine with a session, and the bits of it that the engine has afterwards."""
    found = session.read(directory)
    session.check(directory, found)
    pieces = [
        Piece(
            start=window.start,
            stop=window.stop,
            load=functools.partial(session.load, directory, found, window),
        )
        for window in found.windows
    ]
    other = engine(text)
    other.restore(prompt, pieces)
    number = other.add(Request(prompt=(*prompt, 1), max_new_tokens=2))
    other.step()
    held = bits(other.take(number, 0, len(prompt)), len(prompt))
    other.cancel(number)
    other.step()
    return other, held


def bits(window, length):
    return [np.asarray(array)[:, :length].view(np.uint32) for array in window]


def test_a_session_goes_on_on_another_mesh(tmp_path):
    run("test_sessions_on_meshes", "compare", tmp_path, ["", EIGHT], LENGTHS[:1])


@pytest.mark.long
@pytest.mark.parametrize(
    "meshes",
    [
        ["", "seq=2", "tensor=2", "seq=2,tensor=2", EIGHT],
        ["", "seq=3", "seq=8", "seq=5", "seq=3,tensor=2"],  # 3 and 5 do not divide a window
    ],
)
def test_a_session_goes_on_on_any_mesh(meshes, tmp_path):
    run("test_sessions_on_meshes", "compare", tmp_path, meshes, LENGTHS)


def compare(folder, meshes, lengths):
    """From each mesh to all others: the bits that were saved, the answers of one device."""
    begin()
    alone = engine("")
    writers = {text: engine(text) for text in meshes}
    for length in lengths:
        prompt = random_models.tokens(MODEL, length)
        asked = [
            Request(prompt=(*prompt, *QUESTION[: number + 1]), max_new_tokens=8)
            for number in range(2)
        ]
        expected = alone.run(asked)
        assert len(set(map(tuple, expected))) == len(expected)
        for number, source in enumerate(meshes):
            directory = folder / f"{length}-{number}"
            keep(directory, writers[source], prompt, every=60)
            number = writers[source].add(Request(prompt=prompt, max_new_tokens=2))
            while writers[source].step()[0].prefilled < length:
                pass
            saved = bits(writers[source].take(number, 0, length), length)
            writers[source].cancel(number)
            writers[source].step()
            for target in meshes:
                if target == source and len(meshes) > 1:
                    continue
                other, held = restored(directory, target, prompt)
                for there, here in zip(saved, held, strict=True):
                    np.testing.assert_array_equal(there, here)
                before = other.num_prefilled
                assert other.run(asked) == expected, (source, target, length)
                assert other.num_prefilled - before <= sum(range(1, len(asked) + 1))


def test_every_bit_is_carried():
    run("test_sessions_on_meshes", "carry", ["", EIGHT, "seq=3"])


@pytest.mark.long
def test_every_bit_is_carried_on_any_mesh():
    run("test_sessions_on_meshes", "carry", ["", "seq=2", "seq=2,tensor=4", "seq=5", "seq=7"])


def carry(meshes):
    """From a cache of each mesh into one of each, whatever the bits mean as numbers."""
    begin()
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        caches_of = {text: noise(rng, text, dtype) for text in meshes}
        for source in meshes:
            for target in meshes:
                for start, length in ((0, 41), (7, 30), (13, 1)):
                    check(rng, *caches_of[source], *caches_of[target], start, length)


SIZE = 48  # of a window; 5 and 7 do not divide it


def noise(rng, text, dtype):
    """A mesh and a cache on it of bits that are mostly no numbers, or zeros of both signs."""
    mesh = mesh_of(text) if text else None
    heads, seq = (4, mesh.shape["seq"]) if mesh else (4, 1)
    shape = 2, heads, 12, 3 * seq, 8
    unsigned = np.uint32 if dtype == "float32" else np.uint16
    special = np.array([0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800000, 0, 1], np.uint32)
    special = (special >> 16 if dtype == "bfloat16" else special).astype(unsigned)
    arrays = [
        np.where(
            rng.random(shape) < 0.5,
            rng.choice(special, shape),
            rng.integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True),
        ).view(jnp.dtype(dtype))
        for _ in range(2)
    ]
    placed = arrays
    if mesh:
        where = NamedSharding(mesh, sharding.RULES.spec(caches.AXES))
        placed = [jax.device_put(array, where) for array in arrays]
    return mesh, caches.Cache(*map(jnp.asarray, placed)), arrays


def check(rng, mesh, cache, arrays, other_mesh, other, others, start, length):
    table, other_table = (rng.permutation(11).astype(np.int32) + 1 for _ in range(2))
    unsigned = f"u{arrays[0].dtype.itemsize}"

    def under(mesh, function, *given, **static):
        if mesh is None:
            return jax.jit(functools.partial(function, **static))(*given)
        with jax.set_mesh(mesh):
            return jax.jit(functools.partial(function, **static))(*given)

    window = under(mesh, transfer.take_out, cache, table, jnp.int32(start), size=SIZE)
    page, positions = cache.page, start + np.arange(length)
    for array, found in zip(arrays, window, strict=True):
        expected = array[:, :, table[positions // page], positions % page].swapaxes(1, 2)
        np.testing.assert_array_equal(
            np.asarray(found)[:, :length].view(unsigned), expected.view(unsigned)
        )
    moved = [np.asarray(array) for array in window]
    if other_mesh is not None:
        where = transfer.placement(other_mesh, SIZE)
        moved = [jax.device_put(array, where) for array in moved]
    written = under(
        other_mesh,
        transfer.put_in,
        other,
        *map(jnp.asarray, moved),
        other_table,
        jnp.int32(start),
        jnp.int32(length),
    )
    page = other.page
    for array, found, rows in zip(others, (written.keys, written.values), window, strict=True):
        expected = array.copy()
        for index, position in enumerate(positions):
            row = np.asarray(rows)[:, index]
            expected[:, :, other_table[position // page], position % page] = row
        # Page 0 takes what belongs nowhere.
        np.testing.assert_array_equal(
            np.asarray(found)[:, :, 1:].view(unsigned), expected[:, :, 1:].view(unsigned)
        )
