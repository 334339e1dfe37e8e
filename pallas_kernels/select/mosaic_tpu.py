"""The vote of a slice's last queries for TPU: two kernels that stream the keys.

The first finds each row's log-sum-exp, the second adds up the weights by column and by
diagonal. A step of either multiplies the R rows of all query heads of a kv head with one
tile of keys, which the pipeline fetches from the cache through the page table. Rows lie
last query first, so that row i moves by i places to where its diagonals end in the last
query's row. Of a shard all bounds are local keys, so the kernels know no positions.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch.backend import LANES, Unsupported, check_heads
from pallas_kernels.geometry import INTER, INTRA, SUCC, ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.shard import WHOLE, Shard
from pallas_kernels.softmax import MASKED

_PACKED = 16  # rows of a vector register of bfloat16
TILE = 1024  # keys a step

# Scalars of a slice: which keys all of its rows see, and all in one view.
_LAYER, _END, _WHOLE, _SUCC_FROM, _SUCC_TO, _INTRA_FROM, _INTER_TO = range(7)


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
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """Sums of softmax weights by column and by diagonal; see `api.select`.

    Args:
        tile: keys a step, at most; the largest divisor of the page in whole lanes is used.
        interpret: run on any device, slowly.

    Raises:
        Unsupported: if the page is not a multiple of 128 keys, there are more than 128
            rows, or queries and keys differ in dtype.
    """
    keys = cache.keys
    views, R, N, H = queries.shape
    _, K, _, page, _ = keys.shape
    G, S = N // K, page_table.shape[0] * page
    if not interpret:
        check_heads(H)
    if page % LANES:
        raise Unsupported(f"{page=} must be a multiple of {LANES}: the lanes of a register")
    if R > LANES:
        raise Unsupported(f"{R=} rows must be at most {LANES}: diagonals end in the next tile")
    if queries.dtype != keys.dtype:
        raise Unsupported(f"queries are {queries.dtype}, keys {keys.dtype}; one dtype is needed")
    tile = max(t for t in range(LANES, min(max(tile, LANES), page) + 1, LANES) if page % t == 0)

    padded = max(_PACKED, 1 << (R - 1).bit_length())  # to be halved until one is left
    M = padded * G
    rows = jnp.pad(queries[:, ::-1], ((0, 0), (0, padded - R), (0, 0), (0, 0)))
    rows = rows.reshape(views, padded, K, G, H).swapaxes(1, 2).reshape(views, K, M, H)
    row = jnp.arange(padded, dtype=jnp.int32)
    end = start + length
    votes = row < jnp.minimum(R, length)
    # Rows without a vote see what the slice's first query sees, and are left out of the sums.
    q_pos = jnp.maximum(end - 1 - row, jnp.maximum(start, end - R))
    chunk_len = 0 if geometry is None else geometry.chunk_len
    intra_from = 0 * q_pos if geometry is None else q_pos // chunk_len * chunk_len
    succ_from = intra_from - chunk_len
    edges = [end, q_pos[-1] + 1, succ_from[0], intra_from[-1], intra_from[0], succ_from[-1]]
    edges = [shard.before(edge) for edge in edges]
    if shard.count > 1:
        edges[0] = jnp.maximum(edges[0], 1)  # a tile that no row sees, where there is no key
    scalars = jnp.stack([layer, *edges])
    # Of each row: where the keys of its second and of its first view begin, and where they end.
    bounds = shard.before(jnp.stack([succ_from, intra_from, q_pos + 1]))
    bounds = bounds.repeat(G, 1)[..., None]

    def key_map(k, j, scalars, table):
        j = jnp.minimum(j, (scalars[_END] - 1) // tile)
        return scalars[_LAYER], k, table[j * tile // page], j % (page // tile), 0

    key_block = (None, None, None, tile, H)
    precision = jax.lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None
    lse = pl.pallas_call(
        functools.partial(_row_lse, tile=tile, precision=precision),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(K, S // tile),
            in_specs=[
                pl.BlockSpec((views, None, M, H), lambda k, j, *_: (0, k, 0, 0)),
                pl.BlockSpec((3, M, 1), lambda k, j, *_: (0, 0, 0)),
                pl.BlockSpec(key_block, key_map),
            ],
            out_specs=pl.BlockSpec((None, M, LANES), lambda k, j, *_: (k, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((M, LANES), jnp.float32),
                pltpu.VMEM((M, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((K, M, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="select_row_lse",
    )(scalars, page_table, rows, bounds, keys)
    if shard.count > 1:
        lse = jnp.broadcast_to(shard.merge_lse(lse[..., :1]), lse.shape)
    lse = jnp.where(votes.repeat(G)[:, None], lse, jnp.inf)
    out_specs = [pl.BlockSpec((N, tile), lambda j, k, *_: (0, j))] * 2
    out_shape = [jax.ShapeDtypeStruct((N, S), jnp.float32)] * 2
    if shard.count > 1:
        out_specs.append(
            pl.BlockSpec((None, N, LANES), lambda j, k, *_: (j // (page // tile), 0, 0))
        )
        out_shape.append(jax.ShapeDtypeStruct((S // page, N, LANES), jnp.float32))
    columns, diagonals, *over = pl.pallas_call(
        functools.partial(_sums, tile=tile, heads=G, tiles=page // tile, precision=precision),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(S // tile, K),
            in_specs=[
                pl.BlockSpec((views, None, M, H), lambda j, k, *_: (0, k, 0, 0)),
                pl.BlockSpec((3, M, 1), lambda j, k, *_: (0, 0, 0)),
                pl.BlockSpec((None, M, LANES), lambda j, k, *_: (k, 0, 0)),
                pl.BlockSpec(key_block, lambda j, k, *args: key_map(k, j, *args)),
            ],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((K, G, LANES), jnp.float32)],
        ),
        out_shape=out_shape,
        interpret=interpret,
        name="select_sums",
    )(scalars, page_table, rows, bounds, lse, keys)
    if over:
        moved = shard.shift_overflow(over[0].swapaxes(0, 1), page)
        diagonals += moved.reshape(N, S)
    return columns, diagonals


def _with_scores(body, j, scalars, rows_ref, bounds_ref, key_ref, *, tile, precision):
    """`body` of the logits of a tile of keys, if it has any: those that no mask cuts are plain."""
    first, stop = j * tile, (j + 1) * tile
    views = rows_ref.shape[0]

    def dot(view):
        return jax.lax.dot_general(
            rows_ref[view],
            key_ref[...],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=precision,
        )

    if views == 1:
        one_view, view = True, 0
    else:
        inter = stop <= scalars[_INTER_TO]
        succ = (first >= scalars[_SUCC_FROM]) & (stop <= scalars[_SUCC_TO])
        intra = first >= scalars[_INTRA_FROM]
        one_view = inter | succ | intra
        view = jnp.where(intra, INTRA, jnp.where(succ, SUCC, INTER))
    plain = one_view & (stop <= scalars[_WHOLE])

    @pl.when(plain)
    def _():
        body(dot(view))

    @pl.when(~plain & (first < scalars[_END]))
    def _():
        k_pos = first + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)
        logits = dot(INTRA)
        if views > 1:
            near = jnp.where(k_pos < bounds_ref[1], dot(SUCC), logits)
            logits = jnp.where(k_pos < bounds_ref[0], dot(INTER), near)
        body(jnp.where(k_pos < bounds_ref[2], logits, MASKED))


def _row_lse(
    scalars, table, rows_ref, bounds_ref, key_ref, lse_ref, m_ref, l_ref, *, tile, precision
):
    """Each row's log-sum-exp; m and l are kept per lane, so no step reduces across lanes."""
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, MASKED)
        l_ref[...] = jnp.zeros_like(l_ref)

    def body(logits):
        parts = [logits[:, i : i + LANES] for i in range(0, tile, LANES)]
        m_old = m_ref[...]
        m = functools.reduce(jnp.maximum, parts, m_old)
        l = l_ref[...] * jnp.exp(m_old - m)
        l_ref[...] = functools.reduce(jnp.add, [jnp.exp(part - m) for part in parts], l)
        m_ref[...] = m

    _with_scores(body, j, scalars, rows_ref, bounds_ref, key_ref, tile=tile, precision=precision)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        m = m_ref[...].max(1, keepdims=True)
        l = (l_ref[...] * jnp.exp(m_ref[...] - m)).sum(1, keepdims=True)
        lse_ref[...] = jnp.broadcast_to(m + jnp.log(l), lse_ref.shape)


def _sums(
    scalars,
    table,
    rows_ref,
    bounds_ref,
    lse_ref,
    key_ref,
    columns_ref,
    diagonals_ref,
    *refs,
    tile,
    heads,
    tiles,
    precision,
):
    """Weights of a tile by column and by diagonal; `carry` is what falls into the next tile.

    Of a shard a third output takes what falls past a part of a page, of so many `tiles`: what
    comes after it is on another device.
    """
    j, k = pl.program_id(0), pl.program_id(1)
    *over_ref, carry_ref = refs

    @pl.when((j == 0) & (k == 0))
    def _():
        carry_ref[...] = jnp.zeros_like(carry_ref)

    @pl.when(j * tile >= scalars[_END])
    def _():
        columns_ref[...] = jnp.zeros_like(columns_ref)
        diagonals_ref[...] = jnp.zeros_like(diagonals_ref)

    for ref in over_ref:

        @pl.when((jax.lax.rem(j, jnp.int32(tiles)) == 0) & (k == 0))
        def _(ref=ref):
            ref[...] = jnp.zeros_like(ref)

    def body(logits):
        p = jnp.exp(logits - jnp.concatenate([lse_ref[...]] * (tile // LANES), axis=1))
        column = _sum_rows(p, heads)
        p = jnp.concatenate([p, jnp.zeros((len(p), LANES), jnp.float32)], axis=1)
        diagonal = _sum_rows(p, heads, move=True)
        carry = carry_ref[k]
        carry_ref[k] = diagonal[:, tile:]
        moved = [diagonal[:, :LANES] + carry]
        if tile > LANES:
            moved.append(diagonal[:, LANES:tile])
        diagonal = jnp.concatenate(moved, axis=1)
        for g in range(heads):
            head = pl.ds(k * heads + g, 1)
            columns_ref[head], diagonals_ref[head] = column[g : g + 1], diagonal[g : g + 1]
        for ref in over_ref:

            @pl.when(jax.lax.rem(j, jnp.int32(tiles)) == tiles - 1)
            def _(ref=ref):
                for g in range(heads):
                    ref[pl.ds(k * heads + g, 1)] = carry_ref[k, pl.ds(g, 1)]
                carry_ref[k] = jnp.zeros_like(carry)

    _with_scores(body, j, scalars, rows_ref, bounds_ref, key_ref, tile=tile, precision=precision)


def _sum_rows(p: Float[Array, "M S"], heads: int, *, move: bool = False) -> Float[Array, "G S"]:
    """The sum of all rows of each of G heads, row i moved by i places if `move`."""
    rows = len(p) // heads
    while rows > 1:
        rows //= 2
        upper = p[rows * heads :]
        p = p[: rows * heads] + (pltpu.roll(upper, rows, 1) if move else upper)
    return p
