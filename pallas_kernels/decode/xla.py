"""Decode as a blockwise online softmax in XLA operations, one sequence after another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.blockwise import attend_tile
from pallas_kernels.dispatch.tiles import of_page
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.shard import WHOLE, Shard

TILE = 1024  # keys a step


def decode(
    queries: Float[Array, "views B Q N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, "B P"],
    positions: Int[Array, "B Q"],
    *,
    geometry: ChunkGeometry | None,
    shard: Shard = WHOLE,
    tile: int = TILE,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B Q N"]]:
    """See `api.decode`. Takes every shape; the tile shrinks to a divisor of the page."""
    views, _, Q, N, H = queries.shape
    K, page = cache.keys.shape[1], cache.page
    G = N // K

    def attend(row):
        query, table, position = row
        last = position.max()
        # Grouped heads and tokens share their keys, so they are the rows of one product.
        # Idle tokens stand at the last position, lest they keep tiles from being whole.
        out, lse = attend_tile(
            query.reshape(views, Q, K, G, H).swapaxes(1, 2).reshape(views, K, Q * G, H),
            jnp.repeat(jnp.where(position < 0, last, position), G),
            cache,
            layer,
            jnp.int32(0),
            table,
            last + 1,
            geometry=geometry,
            tile=of_page(page, tile),
            shard=shard,
        )
        out = out.reshape(K, Q, G, H).swapaxes(0, 1).reshape(Q, N, H)
        lse = lse.reshape(K, Q, G).swapaxes(0, 1).reshape(Q, N)
        busy = (position >= 0)[:, None]
        out = jnp.where(busy[..., None], out, 0).astype(queries.dtype)
        return out, jnp.where(busy, lse, -jnp.inf)

    return jax.lax.map(attend, (queries.swapaxes(0, 1), page_table, positions))
