"""Where the keys of a tile of queries change their region of Dual Chunk Attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.blockwise import whole_tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.shard import Shard


def ends(
    first: Int[Array, "*B"],
    last: Int[Array, "*B"],
    tile: int | None,
    *,
    start: Int[Array, ""],
    length: Int[Array, ""],
    geometry: ChunkGeometry | None,
    shard: Shard,
) -> tuple[Int[Array, "*B views"], Int[Array, "*B"]]:
    """Of queries from `first` to `last`: where whole tiles of each region end, and all keys.

    Args:
        tile: keys of one; None if there are none.
    """

    def of_one(first, last):
        q_pos = start + jnp.minimum(jnp.stack([first, last]), length - 1)
        kv_len = jnp.where(first < length, start + length, 0)
        found = []
        if tile is not None:
            found = whole_tiles(q_pos, kv_len, tile=tile, geometry=geometry, shard=shard)
        stops = [stop for _, stop in found] or [jnp.int32(0)] * (1 if geometry is None else 3)
        return jnp.stack(stops), shard.before(jnp.minimum(q_pos[1] + 1, kv_len))

    for _ in first.shape:
        of_one = jax.vmap(of_one)
    return of_one(first, last)
