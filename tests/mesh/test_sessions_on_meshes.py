"""Keys and values that one mesh has read and another goes on after: every bit, and every answer."""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from support import compilation, random_models
from support.children import run
from support.on_meshes import CONFIG, PART, mesh_of, place

from pallas_kernels.paged_kv import PagedKV
from qwen_jax.distributed import sharding
from qwen_jax.engine.data_parallel import build
from qwen_jax.engine.engine import EngineConfig, Piece
from qwen_jax.engine.request import Request
from qwen_jax.models import kv_cache, kv_transfer
from qwen_jax.storage import kv_session
from qwen_jax.storage.kv_session import Identity, Writer

# Without temperature, which depends on the length of the whole prompt.
MODEL = dataclasses.replace(CONFIG, original_len=0)
LENGTHS = 203, 97, 64, 5  # tokens of sessions: chunks of 64 end within them, at their end, nowhere
QUESTIONS = (3,), (14, 15), (9, 26, 53)
EIGHT = "seq=4,tensor=2"


def engine(text):
    """An engine of a random model on a mesh, or on one device."""
    seq = sharding.parse(text).seq if text else 1
    tree = place(MODEL, random_models.weights(MODEL), text)
    return build(
        MODEL, tree, EngineConfig(max_len=256, prefix_tokens=203, page=PART * seq, slices=(48,))
    )


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


def restore(engine, directory, prompt):
    """Puts a session into an engine; returns the bits of it that the engine has then."""
    found = kv_session.read(directory)
    kv_session.check(directory, found)
    pieces = [
        Piece(
            start=window.start,
            stop=window.stop,
            load=functools.partial(kv_session.load, directory, found, window),
        )
        for window in found.windows
    ]
    engine.restore(prompt, pieces)
    return held(engine, (*prompt, 1), len(prompt))


def held(engine, prompt, length):
    """Bits of the first tokens of a prompt in an engine, which reads what it does not have."""
    number = engine.add(Request(prompt=prompt, max_new_tokens=2))
    while engine.step()[0].prefilled < len(prompt):
        pass
    found = bits(engine.take(number, 0, length), length)
    engine.cancel(number)
    engine.step()
    return found


def bits(window, length):
    return [np.asarray(array)[:, :length].view(np.uint32) for array in window]


def test_one_device_goes_on_after_eight(tmp_path):
    run(compare, tmp_path, {EIGHT: [""]}, LENGTHS[:1])


@pytest.mark.long
def test_eight_devices_go_on_after_fewer_and_fewer_after_eight(tmp_path):
    fewer = ["", "seq=2", "tensor=2", "seq=2,tensor=2"]
    pairs = {EIGHT: fewer} | {text: [EIGHT] for text in fewer}
    run(compare, tmp_path, pairs, LENGTHS)


@pytest.mark.long
def test_meshes_that_do_not_divide_a_window_go_on(tmp_path):
    pairs = {"seq=3": ["", "seq=5"], "": ["seq=3,tensor=2"], "seq=5": ["seq=3"]}
    run(compare, tmp_path, pairs, LENGTHS)


def compare(folder, pairs, lengths):
    """From meshes to others: the bits that were saved, and the answers of one device."""
    jax.config.update("jax_num_cpu_devices", 8)
    engines = {text: engine(text) for text in {"", *pairs, *itertools.chain(*pairs.values())}}
    for length in lengths:
        prompt = random_models.tokens(MODEL, length)
        asked = [Request(prompt=(*prompt, *question), max_new_tokens=8) for question in QUESTIONS]
        expected = engines[""].run(asked)
        assert len(set(map(tuple, expected))) > 1
        for number, (source, targets) in enumerate(pairs.items()):
            directory = folder / f"{length}-{number}"
            keep(directory, engines[source], prompt, every=60)
            saved = held(engines[source], prompt, length)
            for target in targets:
                other = engines[target]
                for there, here in zip(saved, restore(other, directory, prompt), strict=True):
                    np.testing.assert_array_equal(there, here)
                before = other.num_prefilled
                assert other.run(asked) == expected, (source, target, length)
                assert other.num_prefilled - before == sum(map(len, QUESTIONS))
                other.forget()


def test_every_bit_is_carried():
    run(carry, ["", EIGHT])


@pytest.mark.long
def test_every_bit_is_carried_on_any_mesh():
    run(carry, ["", "seq=3", "seq=2,tensor=4", "seq=5"])


def carry(meshes):
    """From a cache of each mesh into one of each, whatever the bits mean as numbers."""
    jax.config.update("jax_num_cpu_devices", 8)
    # They decide how a bfloat16 is moved: as it is, or as a float32, where subnormal ones are lost.
    compilation.optimize(True)
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        caches_of = {text: noise(rng, text, dtype) for text in meshes}
        for source in meshes:
            for target in meshes:
                if source == target and source:
                    continue
                for start, length in ((0, 41), (7, 30), (13, 1)):
                    check(rng, *caches_of[source], *caches_of[target], start, length)


SIZE = 48  # of a window; 5 and 7 do not divide it


def noise(rng, text, dtype):
    """A mesh and a cache on it of bits that are mostly no numbers, or zeros of both signs."""
    mesh = mesh_of(text) if text else None
    heads, seq = (4, mesh.shape["seq"]) if mesh else (4, 1)
    shape = 2, heads, 12, 4 * seq, 8
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
        where = NamedSharding(mesh, sharding.RULES.spec(kv_cache.AXES))
        placed = [jax.device_put(array, where) for array in arrays]
    return mesh, PagedKV(*map(jnp.asarray, placed)), arrays


def check(rng, mesh, cache, arrays, other_mesh, other, others, start, length):
    table, other_table = (rng.permutation(11).astype(np.int32) + 1 for _ in range(2))
    with on(mesh):
        window = extract_kv(cache, table, jnp.int32(start), size=SIZE)
    page, positions = cache.page, start + np.arange(length)
    for array, found in zip(arrays, window, strict=True):
        expected = array[:, :, table[positions // page], positions % page].swapaxes(1, 2)
        assert_same(np.asarray(found)[:, :length], expected)
    moved = [np.asarray(array) for array in window]
    if other_mesh is not None:
        where = kv_transfer.placement(other_mesh, SIZE)
        moved = [jax.device_put(array, where) for array in moved]
    with on(other_mesh):
        given = [*map(jnp.asarray, moved), other_table, jnp.int32(start), jnp.int32(length)]
        written = insert_kv(other, *given)
    page = other.page
    for array, found, rows in zip(others, (written.keys, written.values), window, strict=True):
        expected = array.copy()
        for index, position in enumerate(positions):
            row = np.asarray(rows)[:, index]
            expected[:, :, other_table[position // page], position % page] = row
        # Page 0 takes what belongs nowhere.
        assert_same(np.asarray(found)[:, :, 1:], expected[:, :, 1:])


extract_kv = jax.jit(kv_transfer.extract_kv, static_argnames="size")
insert_kv = jax.jit(kv_transfer.insert_kv)


def on(mesh):
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def assert_same(found, expected):
    """Compares bits; of a bfloat16 that is no number CPUs keep only that."""
    if found.dtype == jnp.bfloat16:
        nothing = np.isnan(expected.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nothing)
        found, expected = found[~nothing], expected[~nothing]
    unsigned = f"u{found.dtype.itemsize}"
    np.testing.assert_array_equal(found.view(unsigned), expected.view(unsigned))
