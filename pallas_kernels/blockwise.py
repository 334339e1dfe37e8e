"""Flash attention of one query tile against paged keys, in XLA operations.

The keys before a query tile fall into the three regions of Dual Chunk Attention, each
with one view of the query; a loop over the whole tiles of each region does nothing but
attend. Tiles that a mask or a border of chunks cuts go through a fourth, general loop.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax
from pallas_kernels.geometry import INTER, INTRA, SUCC, ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.regions import whole_tiles
from pallas_kernels.shard import Shard


def scores(
    queries: Float[Array, "views J M H"],
    q_pos: Int[Array, "*J M"],
    key: Float[Array, "J S H"],
    k_pos: Int[Array, "*J S"],
    kv_len: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
) -> Float[Array, "J M S"]:
    """Logits of every pair, each in its view; pairs that are not causal hold `softmax.MASKED`."""
    q_pos, k_pos = q_pos[..., None], k_pos[..., None, :]
    if geometry is None:
        logits = dot(queries[0], key)
    else:
        nearest = geometry.view(q_pos.min(), k_pos.max())
        farthest = geometry.view(q_pos.max(), k_pos.min())

        def mixed():
            pair = geometry.view(q_pos, k_pos)
            near = jnp.where(pair == INTRA, dot(queries[INTRA], key), dot(queries[SUCC], key))
            return jnp.where(pair == INTER, dot(queries[INTER], key), near)

        logits = jax.lax.cond(
            nearest == farthest,
            lambda: dot(jax.lax.dynamic_index_in_dim(queries, nearest, 0, False), key),
            mixed,
        )
    return jnp.where((k_pos < kv_len) & (k_pos <= q_pos), logits, softmax.MASKED)


def dot(queries: Float[Array, "J M H"], key: Float[Array, "J S H"]) -> Float[Array, "J M S"]:
    """Logits of every pair, in float32."""
    return jnp.einsum("JMH,JSH->JMS", queries, key, preferred_element_type=jnp.float32)


def fetch(
    array: Float[Array, "L K pages page H"],
    layer: Int[Array, ""],
    head: Int[Array, ""],
    page_table: Int[Array, " P"],
    first: Int[Array, ""],
    *,
    heads: int,
    count: int,
) -> Float[Array, "heads count H"]:
    """`count` consecutive keys or values of one page from position `first`."""
    page, H = array.shape[3:]
    # `first` adds nothing: it keeps the read in its loop where a table of one page makes it the
    # same in every round. Before the loop, compilers make the last write a part of the read, which
    # then needs a copy of the cache from before that write.
    index = (
        layer + jnp.minimum(first, 0),
        head,
        page_table[first // page],
        first % page,
        jnp.int32(0),
    )
    block = jax.lax.dynamic_slice(array, index, (1, heads, 1, count, H))
    return block.reshape(heads, count, H)


def attend_tile(
    queries: Float[Array, "views J M H"],
    q_pos: Int[Array, " M"],
    cache: PagedKV,
    layer: Int[Array, ""],
    head: Int[Array, ""],
    page_table: Int[Array, " P"],
    kv_len: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    tile: int,
    shard: Shard,
) -> tuple[Float[Array, "J M H"], Float[Array, "J M"]]:
    """Output and log-sum-exp of M scaled queries over their causal keys below `kv_len`.

    Args:
        queries: rows of J consecutive kv heads.
        head: the first of these kv heads.
        q_pos: absolute position of each row; rows of one position may repeat (grouped heads).
        kv_len: keys that exist; 0 computes nothing and returns empty rows.
        tile: keys a step; must divide the page.
    """
    _, J, M, H = queries.shape
    end = shard.before(jnp.minimum(q_pos.max() + 1, kv_len))

    def tile_of(array, j):
        return fetch(array, layer, head, page_table, j * tile, heads=J, count=tile)

    def plain(view):
        def body(j, state):
            logits = dot(queries[view], tile_of(cache.keys, j))
            return softmax.update(state, logits, tile_of(cache.values, j))

        return body

    def general(j, state):
        k_pos = shard.position(j * tile + jnp.arange(tile, dtype=jnp.int32))
        logits = scores(queries, q_pos, tile_of(cache.keys, j), k_pos, kv_len, geometry=geometry)
        # 0 x nan of a stale page is nan
        value = jnp.where((k_pos < kv_len)[:, None], tile_of(cache.values, j), 0)
        return softmax.update(state, logits, value)

    state = softmax.start((J, M), H)
    done = jnp.int32(0)
    for view, stop in whole_tiles(q_pos, kv_len, tile=tile, geometry=geometry, shard=shard):
        state, done = jax.lax.fori_loop(done, stop, plain(view), state), stop
    state = jax.lax.fori_loop(done, -(-end // tile), general, state)
    return softmax.finish(state)
