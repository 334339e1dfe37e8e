"""Prefill as a blockwise online softmax in XLA operations, for any device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.blockwise import attend_tile
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.tiles import Tiles, largest_divisor

TILES = Tiles(q=256, k=512)


def prefill(
    queries: Float[Array, "views T N H"],
    keys: Float[Array, "L K pages page H"],
    values: Float[Array, "L K pages page H"],
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    tiles: Tiles = TILES,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """See `api.prefill`. Takes every shape; a tile shrinks to a divisor of T and of the page."""
    views, T, N, H = queries.shape
    K, page = keys.shape[1], keys.shape[3]
    G = N // K
    q_tile, k_tile = largest_divisor(T, tiles.q), largest_divisor(page, tiles.k)

    def attend(i):
        block = jax.lax.dynamic_slice_in_dim(queries, i * q_tile, q_tile, axis=1)
        # Grouped heads share their keys, so they join the rows of one product.
        block = block.reshape(views, q_tile, K, G, H).transpose(0, 2, 3, 1, 4)
        block = block.reshape(views, K, G * q_tile, H)
        q_start = start + i * q_tile
        q_pos = q_start + jnp.tile(jnp.arange(q_tile, dtype=jnp.int32), G)
        out, lse = attend_tile(
            block,
            q_pos,
            keys,
            values,
            layer,
            page_table,
            jnp.where(i * q_tile < length, start + length, 0),
            geometry=geometry,
            tile=k_tile,
        )
        out = out.reshape(K, G, q_tile, H).transpose(2, 0, 1, 3).reshape(q_tile, N, H)
        lse = lse.reshape(K, G, q_tile).transpose(2, 0, 1).reshape(q_tile, N)
        return out.astype(queries.dtype), lse

    out, lse = jax.lax.map(attend, jnp.arange(T // q_tile, dtype=jnp.int32))
    return out.reshape(T, N, H), lse.reshape(T, N)
