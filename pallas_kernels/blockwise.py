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


def attend_tile(
    queries: Float[Array, "views J M H"],
    q_pos: Int[Array, " M"],
    keys: Float[Array, "L K pages page H"],
    values: Float[Array, "L K pages page H"],
    layer: Int[Array, ""],
    head: Int[Array, ""],
    page_table: Int[Array, " P"],
    kv_len: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    tile: int,
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
    page = keys.shape[3]
    first, last = q_pos.min(), q_pos.max()
    end = jnp.minimum(last + 1, kv_len)
    whole = jnp.minimum(first + 1, kv_len) // tile  # tiles that no mask cuts

    def fetch(cache, j):
        start = j * tile
        index = (layer, head, page_table[start // page], start % page, jnp.int32(0))
        return jax.lax.dynamic_slice(cache, index, (1, J, 1, tile, H)).reshape(J, tile, H)

    def dot(view, key):
        return jnp.einsum("JMH,JSH->JMS", view, key, preferred_element_type=jnp.float32)

    def plain(view):
        def body(j, state):
            return softmax.update(state, dot(queries[view], fetch(keys, j)), fetch(values, j))

        return body

    def general(j, state):
        key, value = fetch(keys, j), fetch(values, j)
        k_pos = j * tile + jnp.arange(tile, dtype=jnp.int32)
        if geometry is None:
            scores = dot(queries[0], key)
        else:
            pair = geometry.view(q_pos[:, None], k_pos[None, :])
            nearest, farthest = pair.min(), pair.max()
            scores = jax.lax.cond(
                nearest == farthest,
                lambda: dot(jax.lax.dynamic_index_in_dim(queries, nearest, 0, False), key),
                lambda: jnp.where(
                    pair == INTRA,
                    dot(queries[INTRA], key),
                    jnp.where(pair == SUCC, dot(queries[SUCC], key), dot(queries[INTER], key)),
                ),
            )
        exists = k_pos < kv_len
        visible = exists & (k_pos <= q_pos[:, None])
        scores = jnp.where(visible, scores, softmax.MASKED)
        value = jnp.where(exists[:, None], value, 0)  # 0 x nan of a stale page is nan
        return softmax.update(state, scores, value)

    state = softmax.start((J, M), H)
    done = jnp.int32(0)
    if geometry is None:
        state, done = jax.lax.fori_loop(done, whole, plain(0), state), whole
    elif geometry.chunk_len % tile == 0:
        chunk = first // geometry.chunk_len
        together = chunk == last // geometry.chunk_len
        whole = jnp.where(together, whole, 0)
        tiles = geometry.chunk_len // tile  # in one chunk
        for view, border in ((INTER, chunk - 1), (SUCC, chunk), (INTRA, chunk + 1)):
            stop = jnp.clip(border * tiles, done, whole)
            state, done = jax.lax.fori_loop(done, stop, plain(view), state), stop
    state = jax.lax.fori_loop(done, -(-end // tile), general, state)
    return softmax.finish(state)
