"""Weights and cache placed by the rules leave the logits as they are on one device.

Here the compiler alone decides what is sent; that the placements are right is all this shows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from children import run
from flax import nnx
from random_models import config

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax import cache as caches
from qwen_jax import params, rope, sharding
from qwen_jax.model import DecodeStep, PrefillStep, Qwen2
from qwen_jax.sharding import MeshShape

CONFIG = dataclasses.replace(
    config(heads=(8, 4), head_dim=16, dual_chunk=ChunkGeometry(64, 16), original_len=64),
    num_layers=2,
    mlp_dim=48,
    vocab_size=64,
)
PAGE, TABLE, SLICE = 16, 8, 48


def test_logits_do_not_depend_on_the_mesh():
    run("test_placement", "compare_meshes", "data=2,seq=2,tensor=2")


def compare_meshes(*meshes):
    jax.config.update("jax_num_cpu_devices", 8)
    graph, state = nnx.split(Qwen2(CONFIG, key=jax.random.key(0), dtype=jnp.float32))
    expected = logits(graph, state, MeshShape())
    for mesh in meshes:
        found = logits(graph, state, sharding.parse(mesh))
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def logits(graph, state, shape):
    """Of the last tokens of two slices, and of two tokens after them."""
    mesh = sharding.make_mesh(jax.devices()[: shape.size], **dataclasses.asdict(shape))
    weights = jax.device_put(nnx.to_pure_dict(state), params.shardings(CONFIG, mesh))
    placed = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(placed, weights)
    parts = shape.data * shape.seq
    lies = jax.sharding.NamedSharding(mesh, sharding.RULES.spec(caches.AXES))
    pages = -(-(TABLE + 1) // parts) * parts
    cache = jax.device_put(caches.init(CONFIG, pages, PAGE, jnp.float32), lies)
    jit = functools.partial(jax.jit, donate_argnames="cache", out_shardings=(None, lies))
    rotary = rope.table(CONFIG, TABLE * PAGE)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 2 * SLICE).astype(np.int32)
    table = jnp.arange(1, TABLE + 1, dtype=jnp.int32)

    def prefill(state, cache, step):
        return nnx.merge(graph, state).prefill(cache, step, rotary)

    def decode(state, cache, step):
        return nnx.merge(graph, state).decode(cache, step, rotary)

    found = []
    compiled = jit(prefill)
    for start in (0, SLICE):
        step = PrefillStep(
            tokens=jnp.asarray(tokens[start : start + SLICE]),
            start=jnp.int32(start),
            length=jnp.int32(SLICE),
            page_table=table,
            query_scale=jnp.float32(1),
            key_scale=jnp.float32(1),
        )
        last, cache = compiled(placed, cache, step)
        found.append(np.asarray(last))
    compiled = jit(decode)
    for position in (2 * SLICE, 2 * SLICE + 1):
        step = DecodeStep(
            tokens=jnp.asarray([position % 7], jnp.int32),
            positions=jnp.asarray([position], jnp.int32),
            page_table=table[None],
            query_scale=jnp.ones(1),
            key_scale=jnp.ones(1),
        )
        last, cache = compiled(placed, cache, step)
        found.append(np.asarray(last[0]))
    return np.stack(found)
