"""The vote of a slice's last queries, in two passes over the keys, in XLA operations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax
from pallas_kernels.blockwise import fetch, scores
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.tiles import of_page

TILE = 1024  # keys a step


def vote(
    queries: Float[Array, "views R N H"],
    keys: Float[Array, "L K pages page H"],
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    tile: int = TILE,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """Sums of softmax weights by column and by diagonal; see `api.select`.

    A diagonal stands at the position that it has in the last row. The first pass finds
    each row's log-sum-exp, the second adds up the weights, so nothing is ever larger
    than [N, S].
    """
    views, R, N, H = queries.shape
    K, page = keys.shape[1], keys.shape[3]
    G, S, end = N // K, page_table.shape[0] * page, start + length
    tile = of_page(page, tile)
    row_pos = end - R + jnp.arange(R, dtype=jnp.int32)
    votes = row_pos >= start
    q_pos = jnp.tile(jnp.maximum(row_pos, 0), G)

    def head_of(head):
        rows = jax.lax.dynamic_slice_in_dim(queries, head * G, G, 2)
        rows = rows.transpose(0, 2, 1, 3).reshape(views, 1, G * R, H)

        def logits(j):
            key = fetch(keys, layer, head, page_table, j * tile, heads=1, count=tile)
            k_pos = j * tile + jnp.arange(tile, dtype=jnp.int32)
            return scores(rows, q_pos, key, k_pos, end, geometry=geometry)[0]

        def first_pass(j, state):
            m, l = state
            s = logits(j)
            m_new = jnp.maximum(m, s.max(-1))
            return m_new, jnp.exp(m - m_new) * l + jnp.exp(s - m_new[:, None]).sum(-1)

        def second_pass(j, sums):
            columns, diagonals = sums
            p = jnp.exp(logits(j) - lse[:, None]).reshape(G, R, tile)
            p = jnp.where(votes[:, None], p, 0)
            columns = jax.lax.dynamic_update_slice(columns, p.sum(1), (0, j * tile))
            at = (0, j * tile)
            old = jax.lax.dynamic_slice(diagonals, at, (G, tile + R - 1))
            return columns, jax.lax.dynamic_update_slice(diagonals, old + _diagonals(p), at)

        num_tiles = -(-end // tile)
        empty = jnp.full(G * R, softmax.MASKED), jnp.zeros(G * R)
        m, l = jax.lax.fori_loop(0, num_tiles, first_pass, empty)
        lse = m + jnp.log(l)
        sums = jnp.zeros((G, S)), jnp.zeros((G, S + R - 1))
        columns, diagonals = jax.lax.fori_loop(0, num_tiles, second_pass, sums)
        return columns, diagonals[:, :S]

    columns, diagonals = jax.lax.map(head_of, jnp.arange(K, dtype=jnp.int32))
    return columns.reshape(N, S), diagonals.reshape(N, S)


def _diagonals(p: Float[Array, "G R S"]) -> Float[Array, "G S+R-1"]:
    """Sums along diagonals: row r, column c goes to place `c + R - 1 - r`."""
    G, R, S = p.shape
    # Rows one longer than what is read of them move by one place each.
    padded = jnp.pad(p[:, ::-1], ((0, 0), (0, 0), (0, R))).reshape(G, -1)
    return padded[:, : R * (S + R - 1)].reshape(G, R, S + R - 1).sum(1)
