"""Flash attention of one query tile over the keys that a plan lists, in XLA operations.

As in `blockwise`, a loop over each region of Dual Chunk Attention does nothing but attend,
and what a mask or a border of chunks cuts goes last.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import softmax
from pallas_kernels.blockwise import dot, fetch, scores
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.regions import whole_tiles
from pallas_kernels.shard import Shard


def attend_listed(
    queries: Float[Array, "views M H"],
    q_pos: Int[Array, " M"],
    cache: PagedKV,
    layer: Int[Array, ""],
    head: Int[Array, ""],
    page_table: Int[Array, " P"],
    kv_len: Int[Array, ""],
    reads: Bool[Array, " blocks"],
    columns: Int[Array, " V"],
    *,
    geometry: ChunkGeometry | None,
    block: int,
    width: int,
    shard: Shard,
) -> tuple[Float[Array, "M H"], Float[Array, " M"]]:
    """Output and log-sum-exp of M scaled queries of one head over listed causal keys.

    Args:
        head: the kv head that the query head reads.
        q_pos: absolute position of each row; the last may repeat.
        kv_len: keys that exist; 0 computes nothing and returns empty rows.
        reads: which blocks of local keys to read.
        columns: ascending local indices of single keys; left out where their block is read.
        block: keys a block; must divide the page.
        width: keys a step.
    """
    queries, H = queries[:, None], queries.shape[-1]
    page = cache.page
    upto = jnp.cumsum(reads & (kv_len > 0), dtype=jnp.int32)
    in_block = jnp.take(reads, columns // block, mode="clip")
    single = ~in_block & (columns < shard.before(jnp.minimum(q_pos[-1] + 1, kv_len)))
    single_upto = jnp.cumsum(single, dtype=jnp.int32)

    def blocks_loop(state, low, high, attend):
        """Attend to the blocks of ranks [low, high)."""
        num = max(width // block, 1)

        def body(i, state):
            rank = low + i * num + jnp.arange(num, dtype=jnp.int32)
            blocks = _chosen(upto, jnp.minimum(rank, high - 1))

            def read(array):
                def one(index):
                    return fetch(
                        array, layer, head, page_table, index * block, heads=1, count=block
                    )

                return jax.vmap(one)(blocks).reshape(1, -1, H)

            local = (blocks[:, None] * block + jnp.arange(block, dtype=jnp.int32)).reshape(-1)
            there = (rank < high).repeat(block)
            return attend(state, read(cache.keys), read(cache.values), shard.position(local), there)

        return jax.lax.fori_loop(0, -(-(high - low) // num), body, state)

    def columns_loop(state, low, high, attend):
        """Attend to the single columns of ranks [low, high)."""

        def body(i, state):
            rank = low + i * width + jnp.arange(width, dtype=jnp.int32)
            local = columns[_chosen(single_upto, jnp.minimum(rank, high - 1))]
            at = layer, head, page_table[local // page], local % page
            key, value = cache.keys[at][None], cache.values[at][None]
            return attend(state, key, value, shard.position(local), rank < high)

        return jax.lax.fori_loop(0, -(-(high - low) // width), body, state)

    def plain(view):
        def attend(state, key, value, _, there):
            logits = jnp.where(there, dot(queries[view], key), softmax.MASKED)
            return softmax.update(state, logits, value)

        return attend

    def general(state, key, value, k_pos, there):
        logits = scores(queries, q_pos, key, k_pos, kv_len, geometry=geometry)
        value = jnp.where((k_pos < kv_len)[:, None], value, 0)  # 0 x nan is nan
        return softmax.update(state, jnp.where(there, logits, softmax.MASKED), value)

    state = softmax.start((1, len(q_pos)), H)
    low, column = jnp.int32(0), jnp.int32(0)
    for view, stop in whole_tiles(q_pos, kv_len, tile=block, geometry=geometry, shard=shard):
        high, column_high = _before(upto, stop), _before(single_upto, _less(columns, stop * block))
        state = blocks_loop(state, low, high, plain(view))
        state = columns_loop(state, column, column_high, plain(view))
        low, column = high, column_high
    state = blocks_loop(state, low, upto[-1], general)
    state = columns_loop(state, column, single_upto[-1], general)
    out, lse = softmax.finish(state)
    return out[0], lse[0]


def _chosen(upto: Int[Array, " n"], rank: Int[Array, " r"]) -> Int[Array, " r"]:
    """Places of the chosen ones of these ranks, where `upto` counts those up to each place."""
    return jnp.searchsorted(upto, rank + 1).astype(jnp.int32)


def _before(upto: Int[Array, " n"], place: Int[Array, ""]) -> Int[Array, ""]:
    """Number of chosen ones before a place."""
    return jnp.where(place > 0, upto[place - 1], 0)


def _less(ascending: Int[Array, " n"], limit) -> Int[Array, ""]:
    return jnp.searchsorted(ascending, limit).astype(jnp.int32)
