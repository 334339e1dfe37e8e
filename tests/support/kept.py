"""KV sessions of the tiny model with an engine that is a checksum, and what they hold."""

import dataclasses
import hashlib
import json
import zlib
from contextlib import ExitStack
from unittest import mock

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.sharding import SingleDeviceSharding

from qwen_jax.engine import engine as engines
from qwen_jax.llm.model import Model
from qwen_jax.sparse.budgets import Report
from qwen_jax.storage import kv_session, orbax_io
from support.fake_runner import FakeRunner

SHAPE = (2, 2, 8)  # layers, key/value heads and their size, of the tiny model
PREFILL = ["--slice", 64, "--save-every", 200]  # saves after 256 and 512 tokens and at the end
TEXT = "in the other thing there is the bee and the bear. " * 18


class Checksum(FakeRunner):
    """Answers depend on every cached token, its scales and how it was prefilled."""

    def prefill_sparse(self, step):
        marked = dataclasses.replace(step, query_scale=step.query_scale + 16)
        return self.prefill(marked), Report(density=jnp.float32(0.5), recall=jnp.float32(0.75))

    def read(self, table, length):
        history = [self.cache[table[i // self.page]][i % self.page] for i in range(length)]
        return history, zlib.crc32(repr(history).encode()) % 256

    def window(self, size):
        layers, heads, head_dim = SHAPE
        placed = SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct((layers, size, heads, head_dim), np.float32, sharding=placed)

    def extract_kv(self, table, start, size):
        keys = np.zeros(self.window(size).shape, np.float32)
        keys[..., :3] = super().extract_kv(table, start, size)[0]
        return jnp.asarray(keys), jnp.asarray(-keys)

    def insert_kv(self, window, table, start, length):
        keys, values = map(np.asarray, window)
        np.testing.assert_array_equal(keys, -values)
        super().insert_kv((keys[..., :3], values), table, start, length)


def checksums():
    """Engines that are checksums instead of real ones, while it is open."""
    patches = ExitStack()
    patches.enter_context(mock.patch.object(engines, "Runner", Checksum))
    patches.enter_context(mock.patch.object(Model, "weights", return_value={"x": jnp.zeros(1)}))
    return patches


def content(directory):
    """Checksum of the keys and values of all tokens of a session, whichever windows there are."""
    found = kv_session.read(directory)
    assert found.is_complete
    kv_session.read_tokens(directory, found)
    kv_session.check(directory, found)
    layers, heads, head_dim = found.identity.shape
    placed = SingleDeviceSharding(jax.devices()[0])
    parts = [], []
    for window in found.windows:
        shape = layers, window.size, heads, head_dim
        target = jax.ShapeDtypeStruct(shape, found.identity.dtype, sharding=placed)
        for part, array in zip(
            parts, kv_session.load(directory, found, window, target), strict=True
        ):
            part.append(np.asarray(array)[:, : window.stop - window.start])
    both = [np.ascontiguousarray(np.concatenate(part, 1)) for part in parts]
    assert all(array.shape[1] == found.identity.num_tokens for array in both)
    return hashlib.sha256(b"".join(array.tobytes() for array in both)).hexdigest()


def sign(directory, change):
    """Changes a manifest as somebody would who can compute its checksum."""
    path = directory / "session.json"
    body = json.loads(path.read_bytes())
    del body["sha256"]
    change(body)
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    path.write_bytes(json.dumps({"sha256": digest, **body}, indent=1).encode() + b"\n")


def sums(folder):
    """Sizes and checksums of the files of a window, as a session lists them."""
    files = orbax_io.flush(folder, folder.parent)
    return msgspec.to_builtins(files)
