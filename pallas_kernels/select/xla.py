"""The vote of a slice's last queries, in two passes over the keys, in XLA operations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax
from pallas_kernels.blockwise import dot, fetch, scores
from pallas_kernels.dispatch.tiles import of_page
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.regions import whole_tiles
from pallas_kernels.shard import WHOLE, Shard

TILE = 1024  # keys a step


def vote(
    queries: Float[Array, "views R N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    shard: Shard = WHOLE,
    tile: int = TILE,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """Sums of softmax weights by column and by diagonal; see `api.select`.

    A diagonal stands at the position that it has in the last row. The first pass finds
    each row's log-sum-exp, the second adds up the weights, so nothing is ever larger
    than [N, S].
    """
    views, R, N, H = queries.shape
    K, page = cache.keys.shape[1], cache.page
    G, pages, end = N // K, page_table.shape[0], start + length
    tile = of_page(page, tile)
    row_pos = end - R + jnp.arange(R, dtype=jnp.int32)
    q_pos = jnp.tile(jnp.maximum(row_pos, 0), G)
    rows = queries.transpose(0, 2, 1, 3).reshape(views, K, G * R, H)

    def sweep(body, state):
        """`body` over all tiles of keys and their logits, those that no mask cuts apart."""

        def key_of(j):
            return fetch(cache.keys, layer, jnp.int32(0), page_table, j * tile, heads=K, count=tile)

        def plain(view):
            return lambda j, state: body(state, j, dot(rows[view], key_of(j)))

        def general(j, state):
            k_pos = shard.position(j * tile + jnp.arange(tile, dtype=jnp.int32))
            logits = scores(rows, q_pos, key_of(j), k_pos, end, geometry=geometry)
            return body(state, j, logits)

        done = jnp.int32(0)
        for view, stop in whole_tiles(q_pos, end, tile=tile, geometry=geometry, shard=shard):
            state, done = jax.lax.fori_loop(done, stop, plain(view), state), stop
        return jax.lax.fori_loop(done, -(-shard.before(end) // tile), general, state)

    def first_pass(state, _, logits):
        m, l = state
        m_new = jnp.maximum(m, logits.max(-1))
        return m_new, jnp.exp(m - m_new) * l + jnp.exp(logits - m_new[..., None]).sum(-1)

    empty = jnp.full((K, G * R), softmax.MASKED), jnp.zeros((K, G * R))
    m, l = sweep(first_pass, empty)
    # Rows before the slice have no vote.
    lse = jnp.where(jnp.tile(row_pos >= start, G), shard.merge_lse(m + jnp.log(l)), jnp.inf)

    def second_pass(sums, j, logits):
        columns, diagonals = sums
        p = jnp.exp(logits - lse[..., None]).reshape(N, R, tile)
        columns = jax.lax.dynamic_update_slice(columns, p.sum(1), (0, j * tile))
        # Diagonals run on past the end of their page.
        new = _diagonals(p)[:, None]
        at = (0, j * tile // page, j * tile % page)
        old = jax.lax.dynamic_slice(diagonals, at, new.shape)
        return columns, jax.lax.dynamic_update_slice(diagonals, old + new, at)

    empty = jnp.zeros((N, pages * page)), jnp.zeros((N, pages, page + R - 1))
    columns, diagonals = sweep(second_pass, empty)
    own = diagonals[..., :page] + shard.shift_overflow(diagonals[..., page:], page)
    return columns, own.reshape(N, -1)


def _diagonals(p: Float[Array, "N R S"]) -> Float[Array, "N S+R-1"]:
    """Sums along diagonals: row r, column c goes to place `c + R - 1 - r`."""
    _, R, S = p.shape
    p = jnp.pad(p, ((0, 0), ((1 << (R - 1).bit_length()) - R, 0), (0, 0)))
    step = 1
    while p.shape[1] > 1:  # neighbouring rows, one of them moved
        upper = jnp.pad(p[:, ::2], ((0, 0), (0, 0), (step, 0)))
        p = upper + jnp.pad(p[:, 1::2], ((0, 0), (0, 0), (0, step)))
        step *= 2
    return p[:, 0, : S + R - 1]
