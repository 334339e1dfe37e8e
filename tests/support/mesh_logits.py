"""Logits of a random model on a mesh: prefill in slices, dense and sparse, and decode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import SparseConfig
from qwen_jax.distributed import sharding
from qwen_jax.models import kv_cache, params, rope
from qwen_jax.models.families.qwen2 import Qwen2
from qwen_jax.models.steps import DecodeStep, PrefillStep
from qwen_jax.sparse import budgets as sparse
from support import random_models

CONFIG = dataclasses.replace(
    random_models.config(
        heads=(16, 8), head_dim=16, dual_chunk=ChunkGeometry(64, 16), original_len=64
    ),
    num_layers=3,
    mlp_dim=48,
    vocab_size=64,
)
PROMPTS = 203, 61  # tokens
ANSWER = 3
SLICE = 48
PART = 16  # tokens of a page on each device


def budgets(config=CONFIG):
    """Budgets of each head that differ from those of the others."""
    shape = config.num_layers, config.num_heads
    vertical = np.arange(np.prod(shape)).reshape(shape) % 40 + 31
    slash = 101 + vertical[::-1] // 4
    return sparse.budgets(
        SparseConfig(
            vertical=tuple(map(tuple, vertical.tolist())),
            slash=tuple(map(tuple, slash.tolist())),
            last_q=24,
        ),
        tiles=Tiles(q=16, k=PART),
    )


def logits(shape, page, budgets, *, config=CONFIG, prompts=PROMPTS, answer=ANSWER):
    """After each slice of two prompts, and after each of the tokens that follow them."""
    mesh = sharding.make_mesh(jax.devices()[: shape.size], **dataclasses.asdict(shape))
    tree = random_models.weights(config)
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Qwen2(config, key=jax.random.key(0), dtype=jnp.float32))
    )
    nnx.replace_by_pure_dict(state, jax.device_put(tree, params.shardings(config, mesh)))
    per_prompt = -(-(max(prompts) + answer) // page)
    lies = jax.sharding.NamedSharding(mesh, sharding.RULES.spec(kv_cache.AXES))
    cache = kv_cache.init(config, 2 * per_prompt + 1, page, jnp.float32)
    cache = jax.tree.map(lambda array: array.at[:].set(jnp.nan), cache)
    cache = jax.device_put(cache, lies)
    rotary = rope.table(config, per_prompt * page)
    jit = functools.partial(jax.jit, donate_argnames="cache")

    def prefill(state, cache, step):
        model = nnx.merge(graph, state)
        if budgets is None:
            return model.prefill(cache, step, rotary)
        logits, cache, report = model.prefill_sparse(cache, step, rotary, budgets)
        return (logits, report), cache

    def decode(state, cache, step):
        return nnx.merge(graph, state).decode(cache, step, rotary)

    tables = 1 + np.random.default_rng(1).permutation(2 * per_prompt).reshape(2, -1)
    tables = tables.astype(np.int32)
    found = []
    with jax.set_mesh(mesh) if shape.size > 1 else jax.default_device(jax.devices()[0]):
        prefill, decode = jit(prefill), jit(decode)
        for number, length in enumerate(prompts):
            tokens = np.asarray(random_models.tokens(config, length), np.int32)
            rng = np.random.default_rng(length)
            start = 0
            while start < length:
                count = min(int(rng.integers(SLICE // 2, SLICE + 1)), length - start)
                padded = np.zeros(SLICE, np.int32)
                padded[:count] = tokens[start : start + count]
                step = PrefillStep(
                    tokens=jnp.asarray(padded),
                    start=jnp.int32(start),
                    length=jnp.int32(count),
                    page_table=jnp.asarray(tables[number]),
                    query_scale=jnp.float32(1.1),
                    key_scale=jnp.float32(1),
                )
                some, cache = prefill(state, cache, step)
                found += map(np.asarray, jax.tree.leaves(some))
                start += count
        for i in range(answer):
            step = DecodeStep(
                tokens=jnp.asarray([i, 7, 9], jnp.int32),
                positions=jnp.asarray([prompts[0] + i, -1, prompts[1] + i], jnp.int32),
                page_table=jnp.asarray(tables[[0, 0, 1]]),
                query_scale=jnp.ones(3),
                key_scale=jnp.ones(3),
            )
            some, cache = decode(state, cache, step)
            found.append(np.asarray(some)[[0, 2]])
    return found
