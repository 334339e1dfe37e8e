"""Decode as a blockwise online softmax in XLA operations, one sequence after another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.blockwise import attend_tile
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.tiles import of_page

TILE = 1024  # keys a step


def decode(
    queries: Float[Array, "views B N H"],
    keys: Float[Array, "L K pages page H"],
    values: Float[Array, "L K pages page H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B P"],
    positions: Int[Array, " B"],
    *,
    geometry: ChunkGeometry | None,
    tile: int = TILE,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """See `api.decode`. Takes every shape; the tile shrinks to a divisor of the page."""
    views, _, N, H = queries.shape
    K, page = keys.shape[1], keys.shape[3]

    def attend(row):
        query, table, position = row
        out, lse = attend_tile(
            query.reshape(views, K, N // K, H),
            jnp.full((N // K,), position, jnp.int32),
            keys,
            values,
            layer,
            jnp.int32(0),
            table,
            position + 1,
            geometry=geometry,
            tile=of_page(page, tile),
        )
        return out.reshape(N, H).astype(queries.dtype), lse.reshape(N)

    return jax.lax.map(attend, (queries.swapaxes(0, 1), page_table, positions))
