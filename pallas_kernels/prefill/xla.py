"""Prefill as a blockwise online softmax in XLA operations, for any device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.blockwise import attend_tile
from pallas_kernels.dispatch.tiles import Tiles, of_page, split
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.listed import attend_listed
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import SparsePlan
from pallas_kernels.shard import WHOLE, Shard

TILES = Tiles(q=1536, k=256)
WIDTH = 128  # listed keys a step


def prefill(
    queries: Float[Array, "views T N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    plan: SparsePlan | None = None,
    shard: Shard = WHOLE,
    tiles: Tiles = TILES,
    width: int = WIDTH,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """See `api.prefill`. Takes every shape; tiles shrink to what divides T and the page.

    Args:
        tiles: tile sizes without a plan, which has its own.
        width: keys per step with a plan.
    """
    views, T, N, H = queries.shape
    K, page = cache.keys.shape[1], cache.page
    G = N // K
    if plan is not None:
        args = queries, cache, layer, page_table, start, length, plan
        return _sparse(*args, geometry=geometry, width=width, shard=shard)
    count, q_tile = split(T, max(tiles.q // G, 1))
    k_tile = of_page(page, tiles.k)

    # Grouped heads share their keys, so they join the rows of one product.
    rows = jnp.pad(queries, ((0, 0), (0, count * q_tile - T), (0, 0), (0, 0)))
    rows = rows.reshape(views, count, q_tile, K, G, H).transpose(1, 3, 0, 2, 4, 5)
    rows = rows.reshape(count, K, views, 1, q_tile * G, H)

    def attend(number):
        i, head = number // K, number % K
        # Padding repeats the last position, lest it reach into the next chunk.
        row = jnp.minimum(i * q_tile + jnp.arange(q_tile, dtype=jnp.int32), length - 1)
        q_pos = start + jnp.repeat(row, G)
        return attend_tile(
            rows[i, head],
            q_pos,
            cache,
            layer,
            head,
            page_table,
            jnp.where(i * q_tile < length, start + length, 0),
            geometry=geometry,
            tile=k_tile,
            shard=shard,
        )

    # One kv head at a time: its scores stay in a core's cache.
    out, lse = jax.lax.map(attend, jnp.arange(count * K, dtype=jnp.int32))
    out = out.reshape(count, K, q_tile, G, H).swapaxes(1, 2).reshape(-1, N, H)
    lse = lse.reshape(count, K, q_tile, G).swapaxes(1, 2).reshape(-1, N)
    return out[:T].astype(queries.dtype), lse[:T]


def _sparse(
    queries,
    cache,
    layer,
    page_table,
    start,
    length,
    plan: SparsePlan,
    *,
    geometry,
    width,
    shard,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    _, T, N, H = queries.shape
    K, q_tile = cache.keys.shape[1], plan.tiles.q
    count = -(-T // q_tile)
    rows = jnp.pad(queries, ((0, 0), (0, count * q_tile - T), (0, 0), (0, 0)))
    reads = plan.reads()

    def head_of(n):
        of_head = jax.lax.dynamic_index_in_dim(rows, n, 2, False)

        def tile_of(i):
            row = jnp.minimum(i * q_tile + jnp.arange(q_tile, dtype=jnp.int32), length - 1)
            return attend_listed(
                jax.lax.dynamic_slice_in_dim(of_head, i * q_tile, q_tile, 1),
                start + row,
                cache,
                layer,
                n // (N // K),
                page_table,
                jnp.where(i * q_tile < length, start + length, 0),
                reads[n, i],
                plan.columns[n],
                geometry=geometry,
                block=plan.tiles.k,
                width=width,
                shard=shard,
            )

        out, lse = jax.lax.map(tile_of, jnp.arange(count, dtype=jnp.int32))
        return out.reshape(-1, H)[:T].astype(queries.dtype), lse.reshape(-1)[:T]

    out, lse = jax.lax.map(head_of, jnp.arange(N, dtype=jnp.int32))
    return out.swapaxes(0, 1), lse.T
