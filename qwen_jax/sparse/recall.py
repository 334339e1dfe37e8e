"""Recall survey: attention recall and density of every pair of budgets on a slice.

A key is found by every column budget from the first one on that selects it, and likewise by
diagonal budgets. So two indices per key into the ascending lists of budgets describe all pairs
of budgets at once, and the attention of a few queries is summed by these indices.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import plan
from pallas_kernels.blockwise import fetch, scores
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.select import Votes, select_keys

ROWS = 128
"""Number of queries of a slice, evenly spaced, whose attention is summed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Budgets to survey, in ascending order.

    Attributes:
        vertical: numbers of key columns.
        slash: numbers of diagonals.
        last_q: queries at the end of a slice that vote.
        tiles: tile sizes of the plans.
    """

    vertical: tuple[int, ...]
    slash: tuple[int, ...]
    last_q: int
    tiles: Tiles


class Survey(NamedTuple):
    """Sums over the keys of a slice, by the first budgets that select a key, float32.

    V and S are the numbers of column and diagonal budgets plus one: the last index of either
    axis is for keys that no budget selects.

    Attributes:
        mass: attention of the mean query; sums to 1.
        singles: pairs of query and key that a kernel computes if a key is a column only.
        blocks: pairs that it computes in blocks, by diagonal budget.
        dense: pairs that it computes without a plan.
    """

    mass: Float[Array, "*L N V S"]
    singles: Float[Array, "*L N V S"]
    blocks: Float[Array, "*L N S"]
    dense: Float[Array, "*L N"]

    def recall(self) -> Float[np.ndarray, "*L N V S"]:
        """Computes the recall, a fraction of all attention, of each pair of budgets (float64)."""
        mass = np.asarray(self.mass, np.float64)
        return mass.sum((-2, -1))[..., None, None] - _beyond(_beyond(mass, -1), -2)

    def density(self) -> Float[np.ndarray, "*L N V S"]:
        """Computes the density, a fraction of dense pairs, of each pair of budgets (float64)."""
        singles = np.asarray(self.singles, np.float64)
        kept = _beyond(singles, -1).cumsum(-2)[..., :-1, :]
        kept = kept + np.asarray(self.blocks, np.float64).cumsum(-1)[..., None, :-1]
        return kept / np.asarray(self.dense, np.float64)[..., None, None]


def _beyond(sums, axis: int):
    """Sums the elements after each index along `axis`; drops the last index."""
    flipped = np.flip(np.flip(sums, axis).cumsum(axis), axis)
    return np.delete(flipped, 0, axis)


def recall_grid(
    queries: Float[Array, "views R N H"],
    lse: Float[Array, "R N"],
    rows: Int[Array, " R"],
    votes: Votes,
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    num_queries: int,
    grid: Grid,
    geometry: ChunkGeometry | None,
) -> Survey:
    """Surveys a slice of one layer.

    No intermediate is larger than a page of keys for all R queries, or all keys for all heads.

    Args:
        queries: R queries of the slice, rotated and scaled.
        lse: log-sum-exp of each query over all its keys.
        rows: index of each query in the slice.
        votes: votes of the slice's last queries for columns and diagonals.
        cache: KV cache that holds the slice.
        layer: index of the layer.
        page_table: pages of the sequence, in order.
        start: position of the slice's first token.
        length: tokens of the slice, without padding.
        num_queries: tokens of the slice, with padding.
        grid: budgets to survey.
        geometry: chunk sizes of Dual Chunk Attention, or None.
    """
    views, R, N, H = queries.shape
    K, page = cache.keys.shape[1], cache.page
    q, B = min(grid.tiles.q, num_queries), grid.tiles.k
    end, count = start + length, -(-num_queries // q)
    final = jnp.minimum(start + (jnp.arange(count, dtype=jnp.int32) + 1) * q, end) - 1
    members = jnp.clip(length - jnp.arange(count) * q, 0, q).astype(jnp.float32)
    first_column, first_block = _first_taken(votes, start, length, num_queries, grid, Tiles(q, B))
    own_tile = jax.nn.one_hot(rows // q, count) / R
    flat = queries.transpose(0, 2, 1, 3).reshape(views, K, N // K * R, H)
    q_pos = jnp.tile(start + rows, N // K)
    shift = lse.T.reshape(K, -1, 1)

    def add(j, sums):
        key = fetch(cache.keys, layer, jnp.int32(0), page_table, j * page, heads=K, count=page)
        k_pos = j * page + jnp.arange(page, dtype=jnp.int32)
        logits = scores(flat, q_pos, key, k_pos, end, geometry=geometry)
        weights = jnp.exp(logits - shift).reshape(N, R, page)
        column = jax.lax.dynamic_slice_in_dim(first_column, j * page, page, 1)
        column = jax.nn.one_hot(column, len(grid.vertical) + 1).reshape(N, page // B, B, -1)
        block = jax.lax.dynamic_slice_in_dim(first_block, j * (page // B), page // B, 2)
        block = jax.nn.one_hot(block, len(grid.slash) + 1)

        def by_budgets(of_key):
            split = of_key.reshape(*of_key.shape[:-1], page // B, B)
            return jnp.einsum("NtbB,NbBv,Ntbs->Nvs", split, column, block)

        mass = by_budgets(jnp.einsum("NRk,Rt->Ntk", weights, own_tile))
        visible = jnp.where(k_pos <= final[:, None], members[:, None], 0)
        singles = by_budgets(jnp.broadcast_to(visible, (N, *visible.shape)))
        return sums[0] + mass, sums[1] + singles

    empty = jnp.zeros((N, len(grid.vertical) + 1, len(grid.slash) + 1))
    mass, singles = jax.lax.fori_loop(0, -(-end // page), add, (empty, empty))
    of_block = jax.nn.one_hot(first_block, len(grid.slash) + 1).sum(2)
    blocks = jnp.einsum("Nts,t->Ns", of_block, members) * B
    dense = ((final // B + 1) * B).astype(jnp.float32) @ members
    return Survey(mass, singles, blocks, jnp.broadcast_to(dense, (N,)))


def _first_taken(votes: Votes, start, length, num_queries: int, grid: Grid, tiles: Tiles):
    """Finds the index of the first budget that selects each column, and each block of each tile.

    Returns:
        int32 arrays [N, keys] and [N, query tiles, key blocks].
    """
    N, S = votes.columns.shape
    end = start + length
    none = jnp.zeros((N, S), bool)

    def column(missing, budget):
        taken = select_keys(votes, end, jnp.full(N, budget), jnp.zeros(N, jnp.int32)).verticals
        return missing + (~taken).astype(jnp.int32), None

    def block(missing, budget):
        taken = select_keys(votes, end, jnp.zeros(N, jnp.int32), jnp.full(N, budget)).slashes
        listed = plan.build(
            none, taken, start, length, num_queries=num_queries, num_columns=1, tiles=tiles
        )
        reads = listed.reads()[..., : S // tiles.k]
        return missing + (~reads).astype(jnp.int32), None

    count = -(-num_queries // tiles.q)
    columns = jnp.zeros((N, S), jnp.int32)
    blocks = jnp.zeros((N, count, S // tiles.k), jnp.int32)
    columns, _ = jax.lax.scan(column, columns, jnp.asarray(grid.vertical, jnp.int32))
    blocks, _ = jax.lax.scan(block, blocks, jnp.asarray(grid.slash, jnp.int32))
    return columns, blocks
