"""The engine's programs compiled for a topology that is not there, and what the compiler made.

Weights and cache are descriptions of arrays, placed as an engine places them, so all this needs
a config.json and libtpu.
"""

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import backend
from qwen_jax import budget, devices, params, rope, sharding, sparse
from qwen_jax import cache as caches
from qwen_jax.config import ConfigError, ModelConfig, SparseConfig
from qwen_jax.engine import batch, runner
from qwen_jax.sharding import MeshShape


def lowered_steps(
    config: ModelConfig, load: budget.Load, mesh: Mesh, budgets: SparseConfig | None = None
) -> Iterator[tuple[str, Any]]:
    platform = mesh.devices.flat[0].platform
    dtype = jnp.dtype(load.dtype)
    whole = NamedSharding(mesh, PartitionSpec())
    of_cache = NamedSharding(mesh, sharding.RULES.spec(caches.AXES))

    def placed(tree, where):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
        )

    tree = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        params.abstract(config, dtype),
        params.shardings(config, mesh),
    )
    weights, structure = runner.flatten(config, tree, dtype)
    backends = backend.choose(platform, head_dim=config.head_dim)
    made = runner.programs(runner.Steps(structure, None, backends), whole, of_cache, platform)
    table_len = -(-load.tokens // load.page)
    cache = jax.eval_shape(
        functools.partial(caches.init, config, table_len + 1, load.page, dtype)
    )
    cache = placed(cache, of_cache)
    rotary = placed(jax.eval_shape(lambda: rope.table(config, table_len * load.page)), whole)
    step = batch.prefill(
        (0,) * load.slice_len,
        size=load.slice_len,
        start=0,
        pages=[],
        table_len=table_len,
        scales=(1.0, 1.0),
    )
    with jax.set_mesh(mesh):
        yield "prefill", made.prefill.lower(weights, rotary, cache, step)
        if budgets is not None:
            chosen = sparse.budgets(
                budgets, num_keys=table_len * load.page, tiles=sparse.tiles_on(platform)
            )
            yield "prefill_sparse", made.prefill_sparse.lower(
                weights, rotary, cache, step, placed(chosen, whole)
            )
        roster = placed(batch.roster((), max_seqs=1, table_len=table_len), whole)
        tokens = batch.tokens((), max_seqs=1, scales=lambda _: (1.0, 1.0))
        seen = placed(jax.ShapeDtypeStruct((1, config.vocab_size), jnp.bool), whole)
        yield "decode", made.decode.lower(weights, rotary, cache, seen, roster, tokens)
