"""Flash attention of one query tile over the keys that a plan lists, in XLA operations.

As in `blockwise`, a loop over each region of Dual Chunk Attention does nothing but attend,
and what a mask or a border of chunks cuts goes last.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import softmax
from pallas_kernels.blockwise import dot, fetch, scores, whole_tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.plan import ABSENT


class Columns(NamedTuple):
    """Single keys of one head, ascending by position, then `plan.ABSENT`."""

    positions: Int[Array, " V"]
    keys: Float[Array, "V H"]
    values: Float[Array, "V H"]


def attend_listed(
    queries: Float[Array, "views M H"],
    q_pos: Int[Array, " M"],
    keys: Float[Array, "L K pages page H"],
    values: Float[Array, "L K pages page H"],
    layer: Int[Array, ""],
    head: Int[Array, ""],
    page_table: Int[Array, " P"],
    kv_len: Int[Array, ""],
    reads: Bool[Array, " blocks"],
    columns: Columns,
    *,
    geometry: ChunkGeometry | None,
    block: int,
    width: int,
) -> tuple[Float[Array, "M H"], Float[Array, " M"]]:
    """Output and log-sum-exp of M scaled queries of one head over listed causal keys.

    Args:
        head: the kv head that the query head reads.
        q_pos: absolute position of each row; the last may repeat.
        kv_len: keys that exist; 0 computes nothing and returns empty rows.
        reads: which blocks of keys to read.
        columns: left out where their block is read.
        block: keys a block; must divide the page.
        width: keys a step.
    """
    queries, H = queries[:, None], queries.shape[-1]
    reads = reads & (kv_len > 0)
    upto, listed = _listed(reads)
    in_block = jnp.take(reads, columns.positions // block, mode="clip")
    _, single = _listed(~in_block & (columns.positions < jnp.minimum(q_pos[-1] + 1, kv_len)))
    # Ascending as the columns themselves; those that are left out come last.
    places = jnp.minimum(single, len(single) - 1)
    positions = jnp.where(single < len(single), columns.positions[places], ABSENT)

    def block_of(cache, index):
        return fetch(cache, layer, head, page_table, index * block, heads=1, count=block)[0]

    def blocks_loop(state, low, high, attend):
        """Attend to the blocks of ranks [low, high)."""
        num = max(width // block, 1)

        def body(i, state):
            rank = low + i * num + jnp.arange(num, dtype=jnp.int32)
            blocks = jnp.where(rank < high, jnp.take(listed, rank, mode="clip"), 0)
            key, value = (
                jax.vmap(lambda index, cache=cache: block_of(cache, index))(blocks).reshape(
                    1, -1, H
                )
                for cache in (keys, values)
            )
            k_pos = blocks[:, None] * block + jnp.arange(block, dtype=jnp.int32)
            return attend(state, key, value, k_pos.reshape(-1), (rank < high).repeat(block))

        return jax.lax.fori_loop(0, -(-(high - low) // num), body, state)

    def columns_loop(state, low, high, attend):
        """Attend to the single columns of ranks [low, high)."""

        def body(i, state):
            rank = low + i * width + jnp.arange(width, dtype=jnp.int32)
            k_pos, key, value = (
                jnp.take(part, jnp.take(places, rank, mode="clip"), axis=0) for part in columns
            )
            return attend(state, key[None], value[None], k_pos, rank < high)

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
    for view, stop in whole_tiles(q_pos, kv_len, tile=block, geometry=geometry):
        high, column_high = upto[stop], _before(positions, stop * block)
        state = blocks_loop(state, low, high, plain(view))
        state = columns_loop(state, column, column_high, plain(view))
        low, column = high, column_high
    state = blocks_loop(state, low, upto[-1], general)
    state = columns_loop(state, column, _before(positions, ABSENT), general)
    out, lse = softmax.finish(state)
    return out[0], lse[0]


def _listed(chosen: Bool[Array, " n"]) -> tuple[Int[Array, " n+1"], Int[Array, " n"]]:
    """How many are chosen before each place; the chosen places, ascending, then n."""
    upto = jnp.cumsum(chosen, dtype=jnp.int32)
    rank = jnp.arange(1, len(chosen) + 1, dtype=jnp.int32)
    return jnp.pad(upto, (1, 0)), jnp.searchsorted(upto, rank).astype(jnp.int32)


def _before(positions: Int[Array, " V"], limit) -> Int[Array, ""]:
    return jnp.searchsorted(positions, limit).astype(jnp.int32)
