"""Flash attention of one query tile against paged keys, in XLA operations.

The keys before a query tile fall into the three regions of Dual Chunk Attention, each
with one view of the query; a loop over the whole tiles of each region does nothing but
attend. Tiles that a mask or a border of chunks cuts go through a fourth, general loop.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import softmax
from pallas_kernels.geometry import INTER, INTRA, SUCC, ChunkGeometry
from pallas_kernels.plan import ABSENT


def scores(
    queries: Float[Array, "views J M H"],
    q_pos: Int[Array, " M"],
    key: Float[Array, "J S H"],
    k_pos: Int[Array, " S"],
    kv_len: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
) -> Float[Array, "J M S"]:
    """Logits of every pair, each in its view; pairs that are not causal hold `softmax.MASKED`."""
    if geometry is None:
        logits = _dot(queries[0], key)
    else:
        pair = geometry.view(q_pos[:, None], k_pos[None, :])
        nearest, farthest = pair.min(), pair.max()
        logits = jax.lax.cond(
            nearest == farthest,
            lambda: _dot(jax.lax.dynamic_index_in_dim(queries, nearest, 0, False), key),
            lambda: jnp.where(
                pair == INTRA,
                _dot(queries[INTRA], key),
                jnp.where(pair == SUCC, _dot(queries[SUCC], key), _dot(queries[INTER], key)),
            ),
        )
    return jnp.where((k_pos < kv_len) & (k_pos <= q_pos[:, None]), logits, softmax.MASKED)


def _dot(queries: Float[Array, "J M H"], key: Float[Array, "J S H"]) -> Float[Array, "J M S"]:
    return jnp.einsum("JMH,JSH->JMS", queries, key, preferred_element_type=jnp.float32)


def fetch(
    cache: Float[Array, "L K pages page H"],
    layer: Int[Array, ""],
    head: Int[Array, ""],
    page_table: Int[Array, " P"],
    first: Int[Array, ""],
    *,
    heads: int,
    count: int,
) -> Float[Array, "heads count H"]:
    """`count` consecutive keys or values of one page from position `first`."""
    page, H = cache.shape[3:]
    index = (layer, head, page_table[first // page], first % page, jnp.int32(0))
    block = jax.lax.dynamic_slice(cache, index, (1, heads, 1, count, H))
    return block.reshape(heads, count, H)


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
    first, last = q_pos.min(), q_pos.max()
    end = jnp.minimum(last + 1, kv_len)
    whole = jnp.minimum(first + 1, kv_len) // tile  # tiles that no mask cuts

    def tile_of(cache, j):
        return fetch(cache, layer, head, page_table, j * tile, heads=J, count=tile)

    def plain(view):
        def body(j, state):
            logits = _dot(queries[view], tile_of(keys, j))
            return softmax.update(state, logits, tile_of(values, j))

        return body

    def general(j, state):
        k_pos = j * tile + jnp.arange(tile, dtype=jnp.int32)
        logits = scores(queries, q_pos, tile_of(keys, j), k_pos, kv_len, geometry=geometry)
        # 0 x nan of a stale page is nan
        value = jnp.where((k_pos < kv_len)[:, None], tile_of(values, j), 0)
        return softmax.update(state, logits, value)

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


def attend_listed(
    queries: Float[Array, "views M H"],
    q_pos: Int[Array, " M"],
    keys: Float[Array, "L K pages page H"],
    values: Float[Array, "L K pages page H"],
    layer: Int[Array, ""],
    head: Int[Array, ""],
    page_table: Int[Array, " P"],
    kv_len: Int[Array, ""],
    reads: Bool[Array, " blocks"],
    columns: tuple[Int[Array, " V"], Float[Array, "V H"], Float[Array, "V H"]],
    *,
    geometry: ChunkGeometry | None,
    block: int,
    width: int,
) -> tuple[Float[Array, "M H"], Float[Array, " M"]]:
    """As `attend_tile`, of one query head over listed keys alone.

    Args:
        reads: which blocks of keys to read.
        columns: positions, keys and values of single keys, ascending by position; those in
            blocks that are read are left out, and so are those from `kv_len`.
        block: keys a block; must divide the page.
        width: keys a step, a multiple of the block that divides V.
    """
    M, H = queries.shape[1:]
    num = width // block
    first, last = q_pos[0], q_pos[-1]
    upto = jnp.cumsum(reads, dtype=jnp.int32)
    listed = jnp.searchsorted(upto, jnp.arange(1, len(reads) + num, dtype=jnp.int32))
    listed = listed.astype(jnp.int32)
    count = upto[-1]

    def gather(cache, blocks):
        parts = [
            fetch(cache, layer, head, page_table, blocks[i] * block, heads=1, count=block)
            for i in range(num)
        ]
        return jnp.concatenate(parts, 1)

    def add(state, k_pos, key, value):
        logits = scores(queries[:, None], q_pos, key, k_pos, kv_len, geometry=geometry)
        value = jnp.where((k_pos < kv_len)[:, None], value, 0)  # 0 x nan is nan
        return softmax.update(state, logits, value)

    def whole(state, view, key, value):
        row = jax.lax.dynamic_index_in_dim(queries, view, 0, True)
        return softmax.update(state, _dot(row, key), value)

    def blocks_step(j, state):
        place = j * num + jnp.arange(num, dtype=jnp.int32)
        blocks = jax.lax.dynamic_slice_in_dim(listed, j * num, num)
        there = place < count
        blocks = jnp.where(there, blocks, 0)
        key, value = gather(keys, blocks), gather(values, blocks)
        k_pos = blocks[:, None] * block + jnp.arange(block, dtype=jnp.int32)
        k_pos = jnp.where(there[:, None], k_pos, ABSENT).reshape(-1)
        uncut = there[-1] & (k_pos[-1] <= first) & (k_pos[-1] < kv_len)
        view = jnp.int32(0)
        if geometry is not None:
            view, farthest = geometry.view(first, k_pos[-1]), geometry.view(last, k_pos[0])
            uncut &= view == farthest
        return jax.lax.cond(
            uncut,
            lambda: whole(state, view, key, value),
            lambda: add(state, k_pos, key, value),
        )

    def columns_step(j, state):
        k_pos, key, value = (
            jax.lax.dynamic_slice_in_dim(part, j * width, width) for part in columns
        )
        covered = reads[jnp.minimum(k_pos // block, len(reads) - 1)]
        return add(state, jnp.where(covered, ABSENT, k_pos), key[None], value[None])

    state = softmax.start((1, M), H)
    state = jax.lax.fori_loop(0, -(-count // num), blocks_step, state)
    singles = jnp.searchsorted(columns[0], jnp.minimum(last + 1, kv_len)).astype(jnp.int32)
    state = jax.lax.fori_loop(0, -(-singles // width), columns_step, state)
    out, lse = softmax.finish(state)
    return out[0], lse[0]
