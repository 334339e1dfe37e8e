"""How much attention every pair of budgets would find in a slice, and what it would compute.

A key counts as found from the first budget of columns or of diagonals on that takes it. So two
numbers per key, each the place of a budget in an ascending list, say it for all pairs of
budgets at once, and the attention of a few queries is summed up by them.
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
"""Queries of a slice, evenly spread, whose attention is summed up."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Budgets to survey, ascending.

    Attributes:
        vertical: numbers of columns.
        slash: numbers of diagonals.
        last_q: queries of a slice that vote.
        tiles: of the plans.
    """

    vertical: tuple[int, ...]
    slash: tuple[int, ...]
    last_q: int
    tiles: Tiles


class Survey(NamedTuple):
    """Sums over the keys of a slice, by the first budgets that take a key.

    The last place of either axis is for keys that no budget takes.

    Attributes:
        mass: attention of a mean query; all of it sums to 1.
        singles: pairs that a kernel computes if the key is taken as a column alone.
        blocks: pairs that it computes in blocks, by the budget of diagonals.
        dense: pairs that it computes without a plan.
    """

    mass: Float[Array, "*L N V S"]
    singles: Float[Array, "*L N V S"]
    blocks: Float[Array, "*L N S"]
    dense: Float[Array, "*L N"]

    def recall(self) -> Float[np.ndarray, "*L N V S"]:
        """Share of the attention found, for each pair of budgets."""
        mass = np.asarray(self.mass, np.float64)
        return mass.sum((-2, -1))[..., None, None] - _beyond(_beyond(mass, -1), -2)

    def density(self) -> Float[np.ndarray, "*L N V S"]:
        """Pairs computed, as a share of those without a plan, for each pair of budgets."""
        singles = np.asarray(self.singles, np.float64)
        kept = _beyond(singles, -1).cumsum(-2)[..., :-1, :]
        kept = kept + np.asarray(self.blocks, np.float64).cumsum(-1)[..., None, :-1]
        return kept / np.asarray(self.dense, np.float64)[..., None, None]


def _beyond(sums, axis: int):
    """Sums over all places after each, but for the last."""
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
    """The survey of a slice of one layer.

    Nothing is larger than a page of keys for all R queries, or all keys for all heads.

    Args:
        queries: some of the slice's, scaled.
        lse: log-sum-exp of each over all its keys.
        rows: place of each in the slice.
        num_queries: rows of the slice with its padding.
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
    """The place of the first budget that takes each column and each block of each tile."""
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
