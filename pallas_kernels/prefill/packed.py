"""Packed columns of a plan: single keys that lie apart in the cache, gathered side by side."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import ABSENT, SparsePlan
from pallas_kernels.shard import Shard


class Packed(NamedTuple):
    """Columns of each head, in whole steps.

    Attributes:
        keys: keys of the columns; zero where there is none, as are values.
        local: indices of local keys in ascending order, then `ABSENT`.
        positions: positions of these keys; `ABSENT` where there is none.
    """

    keys: Float[Array, "N V H"]
    values: Float[Array, "N V H"]
    local: Int[Array, "N V"]
    positions: Int[Array, "N V"]


def pack(
    plan: SparsePlan,
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    kv_len: Int[Array, ""],
    *,
    width: int,
    shard: Shard,
) -> Packed:
    """Gather the columns of a plan before `kv_len`, padded to steps of `width`, at least one."""
    N, V = plan.columns.shape
    page = cache.page
    steps = max(-(-V // width), 1)
    local = jnp.pad(plan.columns, ((0, 0), (0, steps * width - V)), constant_values=ABSENT)
    end = shard.before(kv_len)
    at = jnp.minimum(local, jnp.maximum(end - 1, 0))
    head = jnp.arange(N, dtype=jnp.int32)[:, None] // (N // cache.keys.shape[1])
    there = local < end
    index = layer, head, page_table[at // page], at % page
    return Packed(
        keys=jnp.where(there[..., None], cache.keys[index], 0),
        values=jnp.where(there[..., None], cache.values[index], 0),
        local=local,
        positions=jnp.where(there, shard.position(at), ABSENT),
    )
