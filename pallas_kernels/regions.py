"""Regions of Dual Chunk Attention: where the local keys of each view of a query end.

Of one query, the keys of each view are one run of local keys: those of its own chunk end with
itself, those of the chunk before where its own begins, all older ones before these. Of a tile of
queries, whole tiles of keys that lie in one region of all of them need neither mask nor choice of
a view.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.geometry import INTER, INTRA, SUCC, ChunkGeometry
from pallas_kernels.shard import Shard


def row_ends(
    positions: Int[Array, "*rows"], geometry: ChunkGeometry | None, shard: Shard
) -> Int[Array, "views *rows"]:
    """End of the local keys that each row sees in each view; those of the last view begin at 0.

    A row at position -1 sees none.
    """
    last = [positions + 1]
    if geometry is not None:
        chunk = positions // geometry.chunk_len
        last += [(chunk - back).clip(0) * geometry.chunk_len for back in (0, 1)]
    return jnp.stack([shard.before(each) for each in last])


def whole_tiles(
    q_pos: Int[Array, "*J"],
    kv_len: Int[Array, ""],
    *,
    tile: int,
    geometry: ChunkGeometry | None,
    shard: Shard,
) -> list[tuple[int, Int[Array, ""]]]:
    """Ends, in tiles of keys, of what all queries see whole and in one view, for each view.

    In ascending order; the first view begins at tile 0, each other one where the one before ends.
    """
    first, last = q_pos.min(), q_pos.max()
    whole = shard.before(jnp.minimum(first + 1, kv_len)) // tile
    if geometry is None:
        return [(0, whole)]
    if geometry.chunk_len % tile:
        return []
    chunk = first // geometry.chunk_len
    whole = jnp.where(chunk == last // geometry.chunk_len, whole, 0)
    borders = (INTER, chunk - 1), (SUCC, chunk), (INTRA, chunk + 1)
    return [
        (view, jnp.clip(shard.before(border * geometry.chunk_len) // tile, 0, whole))
        for view, border in borders
    ]


def tile_ends(
    first: Int[Array, "*B"],
    last: Int[Array, "*B"],
    tile: int | None,
    *,
    start: Int[Array, ""],
    length: Int[Array, ""],
    geometry: ChunkGeometry | None,
    shard: Shard,
) -> tuple[Int[Array, "*B views"], Int[Array, "*B"]]:
    """Ends of whole tiles of keys in each region, and of all keys, of queries `first` to `last`.

    Args:
        first: row of the slice that a tile of queries begins with.
        last: row that it ends with.
        tile: keys of one; None if no tile is whole.
        start: position of the slice's first query.
        length: queries of the slice; a tile of queries after them sees no key.
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
