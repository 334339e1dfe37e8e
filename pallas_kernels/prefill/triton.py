"""Prefill for NVIDIA GPUs: Triton kernels, dense and by a plan, over the paged cache where it lies.

A program attends for a tile of rows, in steps of keys that each lie in one page. Without a plan
the heads of a kv head join the rows of a tile; with one a tile has one head. The keys of a tile
fall into the three regions of Dual Chunk Attention, each with one view of its queries: a loop over
each region does nothing but attend, and what a mask or a border of chunks cuts goes last, step by
step in the views that it needs. Where these loops end is computed outside, a few numbers a tile.

With a plan, the blocks of a tile are bits, which a loop that reads ahead cannot search. A program
therefore first writes the numbers of its tile's blocks to a list of its own in memory. There are
as many lists as programs, each of which takes many tiles, so that they do not grow with the slice.
The single columns of a head come packed, after the blocks of each region.
"""

import dataclasses
import functools
import math
from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels import triton_call
from pallas_kernels.backend import TRITON_HEADS, Unsupported
from pallas_kernels.blockwise import whole_tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.plan import SparsePlan
from pallas_kernels.shard import WHOLE, Shard
from pallas_kernels.tiles import Tiles

LEAST = 16  # rows, keys and dimensions of a product on tensor cores
PROGRAMS = 1024  # of an attention by a plan: several for each place on a GPU, lest some end late

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**31 - 1)  # position of a key that is not there: after every query


@triton.jit
@no_type_check
def _attend(state, logits, value):
    """The state (maximum to base 2, sum, output) of each row after more keys (arXiv:2205.14135)."""
    m, l, acc = state
    m_new = tl.maximum(m, tl.max(logits, 1) * LOG2_E)
    p = tl.exp2(logits * LOG2_E - m_new[:, None])
    decay = tl.exp2(m - m_new)
    l = l * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
    return m_new, l, acc


@triton.jit
@no_type_check
def _start(BLOCK_M: tl.constexpr, H: tl.constexpr):
    """The state of rows that have seen no key."""
    m = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: -inf - -inf is nan
    return m, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, H], tl.float32)


@triton.jit
@no_type_check
def _finish(state, out, lse, row, there, H: tl.constexpr):
    m, l, acc = state
    safe = tl.where(l > 0, l, 1.0)
    at = row[:, None] * H + tl.arange(0, H)
    tl.store(out + at, (acc / safe[:, None]).to(out.dtype.element_ty), there[:, None])
    tl.store(lse + row, tl.where(l > 0, (m + tl.log2(safe)) * LN_2, float("-inf")), there)


@triton.jit
@no_type_check
def _position(local, index, PART: tl.constexpr, COUNT: tl.constexpr):
    """`Shard.position`."""
    if COUNT == 1:
        return local
    return (local // PART * (COUNT - 1) + index) * PART + local


@triton.jit
@no_type_check
def _run(q_pos, view, CHUNK: tl.constexpr):
    """Positions of the keys that queries see in a view: the first, and one past the last."""
    if CHUNK == 0:
        return tl.zeros_like(q_pos), q_pos + 1
    first = (q_pos // CHUNK - view) * CHUNK
    return tl.where(view == 2, 0, first), tl.where(view == 0, q_pos + 1, first + CHUNK)


@triton.jit
@no_type_check
def _rows(first, end, head, N: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Queries of the rows of a tile, their places among the queries of all heads, which exist."""
    r = first + tl.arange(0, BLOCK_M)
    t = r // G
    return t, t * N + head * G + r % G, r < end


@triton.jit
@no_type_check
def _queries(
    queries,
    view,
    first,
    end,
    head,
    VIEW: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rows of a tile in one view; views lie VIEW numbers apart."""
    _, row, there = _rows(first, end, head, N, G, BLOCK_M)
    at = row[:, None] * H + tl.arange(0, H)
    return tl.load(queries + tl.cast(view, tl.int64) * VIEW + at, there[:, None], 0.0)


@triton.jit
@no_type_check
def _attend_cut(
    state,
    queries,
    first,
    end,
    head,
    start,
    length,
    keys,
    values,
    at,
    k_pos,
    CHUNK: tl.constexpr,
    VIEW: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """As `_attend`, to keys of any position, which lie at `at`, each pair in its view."""
    t, _, _ = _rows(first, end, head, N, G, BLOCK_M)
    q_pos = start + tl.minimum(t, length - 1)
    last = tl.max(q_pos, 0)
    exists = (k_pos <= last)[:, None]
    at = at[:, None] * H + tl.arange(0, H)
    near, far = 0, 0
    if CHUNK > 0:
        newest = tl.max(tl.where(k_pos <= last, k_pos, 0), 0)
        near = tl.minimum(tl.maximum(tl.min(q_pos, 0) // CHUNK - newest // CHUNK, 0), 2)
        far = tl.minimum(tl.maximum(last // CHUNK - tl.min(k_pos, 0) // CHUNK, 0), 2)
    logits = tl.full([BLOCK_M, k_pos.shape[0]], float("-inf"), tl.float32)
    for view in tl.range(near, far + 1, num_stages=1):
        q = _queries(queries, view, first, end, head, VIEW, N, G, H, BLOCK_M)
        # Read once more for each view, lest they take registers.
        key = tl.load(keys + at, exists, 0.0)
        begin, stop = _run(q_pos, view, CHUNK)
        seen = (k_pos[None, :] >= begin[:, None]) & (k_pos[None, :] < stop[:, None])
        logits = tl.where(seen, tl.dot(q, tl.trans(key), input_precision="ieee"), logits)
    return _attend(state, logits, tl.load(values + at, exists, 0.0))


@triton.jit
@no_type_check
def _row_of(table, found, step, high, PAGE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The row of the cache where a step before `high` begins, any row past it; see `_sweep`."""
    if BLOCK > 0:
        steps: tl.constexpr = BLOCK // STEP
        return tl.load(found + step // steps, step < high, 0) + step % steps * STEP
    first = tl.where(step < high, step * STEP, 0)
    return tl.load(table + first // PAGE) * PAGE + first % PAGE


@triton.jit
@no_type_check
def _sweep(
    state,
    q,
    low,
    high,
    keys,
    values,
    table,
    found,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Attend to steps [low, high) of keys that all rows read, all in the view of q.

    Args:
        found: rows of the cache where blocks of BLOCK keys begin, of which the steps are; without
            any, if BLOCK is 0, they are of all keys.
    """
    H: tl.constexpr = q.shape[1]
    within = tl.arange(0, STEP)[:, None] * H + tl.arange(0, H)
    # Where a step lies is read in the step before: keys whose address had to be waited for could
    # not be on their way before.
    row = _row_of(table, found, low, high, PAGE, BLOCK, STEP)
    for j in range(low, high):
        at = row.to(tl.int64) * H
        row = _row_of(table, found, j + 1, high, PAGE, BLOCK, STEP)
        logits = tl.dot(q, tl.trans(tl.load(keys + at + within)), input_precision="ieee")
        state = _attend(state, logits, tl.load(values + at + within))
    return state


@triton.jit
@no_type_check
def _sweep_singles(state, q, num, keys, values, found, STEP: tl.constexpr):
    """Attend to the keys in the first `num` rows of those found, in the view of q."""
    H: tl.constexpr = q.shape[1]
    place = tl.arange(0, STEP)
    last = tl.maximum(num - 1, 0)
    row = tl.load(found + tl.minimum(place, last))
    for begin in range(0, num, STEP):
        at = row.to(tl.int64)[:, None] * H + tl.arange(0, H)
        row = tl.load(found + tl.minimum(begin + STEP + place, last))
        logits = tl.dot(q, tl.trans(tl.load(keys + at)), input_precision="ieee")
        logits = tl.where((begin + place < num)[None, :], logits, float("-inf"))
        state = _attend(state, logits, tl.load(values + at))
    return state


@triton.jit
@no_type_check
def _sweep_cut(
    state,
    queries,
    first,
    end,
    head,
    start,
    length,
    low,
    high,
    keys,
    values,
    table,
    found,
    index,
    PAGE: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    VIEW: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
):
    """As `_sweep`, to keys [low, high) of those read, of any page and position."""
    last = start + tl.minimum((first + BLOCK_M - 1) // G, length - 1)
    for begin in tl.range(low, high, STEP, num_stages=1):
        local = begin + tl.arange(0, STEP)
        listed = local < high
        if BLOCK > 0:
            local = tl.load(found + local // BLOCK, listed, 0) + local % BLOCK
        k_pos = tl.where(listed, _position(local, index, PAGE, COUNT), FAR)
        page = tl.load(table + local // PAGE, k_pos <= last, 0).to(tl.int64)
        at = page * PAGE + local % PAGE
        state = _attend_cut(
            state,
            queries,
            first,
            end,
            head,
            start,
            length,
            keys,
            values,
            at,
            k_pos,
            CHUNK,
            VIEW,
            N,
            G,
            H,
            BLOCK_M,
        )
    return state


@triton.jit
@no_type_check
def _dense(
    queries,
    keys,
    values,
    where,
    table,
    bounds,
    out,
    lse,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    VIEWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows of a kv head, of which row r is of query r // G and head r % G, over all keys.

    Args:
        where: layer, start, length, index of the shard.
        bounds: [tiles, VIEWS + 1, 2], where each region of whole steps ends, then the last key,
            and again and again the first row of the tile: rows that are computed from a number
            just read take no registers before.
    """
    G: tl.constexpr = N // K
    VIEW: tl.constexpr = T * N * H
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    bounds += tile * 2 * (VIEWS + 1)
    layer, start = tl.load(where), tl.load(where + 1)
    length, index = tl.load(where + 2), tl.load(where + 3)
    cache = (layer * K + head).to(tl.int64) * (PAGES * PAGE * H)
    keys += cache
    values += cache

    state = _start(BLOCK_M, H)
    low = 0
    for region in range(VIEWS):
        high = tl.load(bounds + 2 * region)
        first = tl.load(bounds + 2 * region + 1)
        q = _queries(queries, VIEWS - 1 - region, first, T * G, head, VIEW, N, G, H, BLOCK_M)
        state = _sweep(state, q, low, high, keys, values, table, table, PAGE, 0, BLOCK_N)
        low = high
    high = tl.load(bounds + 2 * VIEWS)
    first = tl.load(bounds + 2 * VIEWS + 1)
    state = _sweep_cut(
        state,
        queries,
        first,
        T * G,
        head,
        start,
        length,
        low * BLOCK_N,
        high,
        keys,
        values,
        table,
        table,
        index,
        PAGE,
        COUNT,
        0,
        CHUNK,
        VIEW,
        N,
        G,
        H,
        BLOCK_M,
        STEP,
    )
    first = tl.load(bounds + 1)
    _, row, there = _rows(first, T * G, head, N, G, BLOCK_M)
    _finish(state, out, lse, row, there, H)


@triton.jit
@no_type_check
def _append(found, count, keep, local, table, PAGE: tl.constexpr, ROWS: tl.constexpr):
    """How many are found after local keys to keep, of which ROWS of the cache, or else they."""
    if ROWS:
        local = tl.load(table + local // PAGE, keep, 0) * PAGE + local % PAGE
    chosen = keep.to(tl.int32)
    tl.store(found + count + tl.cumsum(chosen, 0) - chosen, local, keep)
    return count + tl.sum(chosen, 0)


@triton.jit
@no_type_check
def _list_blocks(
    found,
    words,
    low,
    high,
    table,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Find the blocks [low, high) whose bits are set, in order."""
    count = 0
    for first in range(low, high, CHUNK):
        block = first + tl.arange(0, CHUNK)
        word = tl.load(words + block // 32, block < high, 0)
        keep = ((word >> (block % 32)) & 1 == 1) & (block < high)
        count = _append(found, count, keep, block * BLOCK, table, PAGE, ROWS)
    return count


@triton.jit
@no_type_check
def _list_columns(
    found,
    words,
    columns,
    low,
    high,
    table,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Find the columns [low, high) that lie in no block whose bit is set, in order."""
    count = 0
    for first in range(low, high, CHUNK):
        at = first + tl.arange(0, CHUNK)
        column = tl.load(columns + at, at < high, 0)
        word = tl.load(words + column // (32 * BLOCK), at < high, -1)
        keep = ((word >> (column // BLOCK % 32)) & 1 == 0) & (at < high)
        count = _append(found, count, keep, column, table, PAGE, ROWS)
    return count


@triton.jit
@no_type_check
def _sparse(
    queries,
    keys,
    values,
    where,
    table,
    bounds,
    words,
    columns,
    out,
    lse,
    block_lists,
    column_lists,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    VIEWS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Queries of a head over the blocks and columns that a plan gives their tile, Q of a row.

    Args:
        where: layer, start, length, index of the shard.
        bounds: [N, tiles, parts, VIEWS + 1, 3], where the blocks and the columns of each region
            end, then all of them, and again and again the first row, as for `_dense`.
        words: bits of the plan.
        block_lists: [programs, 32 NUM_WORDS], and column_lists [programs, V], where a program
            finds those of a region.
    """
    VIEW: tl.constexpr = T * N * H
    PARTS: tl.constexpr = (Q + BLOCK_M - 1) // BLOCK_M
    TILES: tl.constexpr = (T + Q - 1) // Q * PARTS
    layer, start = tl.load(where), tl.load(where + 1)
    length, index = tl.load(where + 2), tl.load(where + 3)
    blocks = block_lists + tl.program_id(0) * (32 * NUM_WORDS)
    singles = column_lists + tl.program_id(0) * V
    for number in range(tl.program_id(0), N * TILES, tl.num_programs(0)):
        head, tile = number // TILES, TILES - 1 - number % TILES  # the longest of a head first
        of_tile = words + (head * (TILES // PARTS) + tile // PARTS) * NUM_WORDS
        of_head = columns + head * V
        bound = bounds + (head * TILES + tile) * 3 * (VIEWS + 1)
        cache = (layer * K + head // (N // K)).to(tl.int64) * (PAGES * PAGE * H)
        end = tl.minimum((tile // PARTS + 1) * Q, T)

        state = _start(BLOCK_M, H)
        block, column = 0, 0
        if BLOCK % BLOCK_N == 0:
            for region in range(VIEWS):
                to_block = tl.load(bound + 3 * region)
                to_column = tl.load(bound + 3 * region + 1)
                first = tl.load(bound + 3 * region + 2)
                tl.debug_barrier()  # all have read what was listed before
                num = _list_blocks(
                    blocks, of_tile, block, to_block, table, PAGE, BLOCK, True, LISTED
                )
                num_single = _list_columns(
                    singles,
                    of_tile,
                    of_head,
                    column,
                    to_column,
                    table,
                    PAGE,
                    BLOCK,
                    True,
                    LISTED,
                )
                tl.debug_barrier()
                q = _queries(queries, VIEWS - 1 - region, first, end, head, VIEW, N, 1, H, BLOCK_M)
                state = _sweep(
                    state,
                    q,
                    0,
                    num * (BLOCK // BLOCK_N),
                    keys + cache,
                    values + cache,
                    table,
                    blocks,
                    PAGE,
                    BLOCK,
                    BLOCK_N,
                )
                state = _sweep_singles(
                    state, q, num_single, keys + cache, values + cache, singles, BLOCK_N
                )
                block, column = to_block, to_column
        to_block = tl.load(bound + 3 * VIEWS)
        to_column = tl.load(bound + 3 * VIEWS + 1)
        first = tl.load(bound + 3 * VIEWS + 2)
        tl.debug_barrier()
        num = _list_blocks(blocks, of_tile, block, to_block, table, PAGE, BLOCK, False, LISTED)
        num_single = _list_columns(
            singles, of_tile, of_head, column, to_column, table, PAGE, BLOCK, False, LISTED
        )
        tl.debug_barrier()
        for singly in tl.static_range(2):
            state = _sweep_cut(
                state,
                queries,
                first,
                end,
                head,
                start,
                length,
                0,
                num_single if singly else num * BLOCK,
                keys + cache,
                values + cache,
                table,
                singles if singly else blocks,
                index,
                PAGE,
                COUNT,
                1 if singly else BLOCK,
                CHUNK,
                VIEW,
                N,
                1,
                H,
                BLOCK_M,
                STEP,
            )
        first = tl.load(bound + 2)
        _, row, there = _rows(first, end, head, N, 1, BLOCK_M)
        _finish(state, out, lse, row, there, H)


@dataclasses.dataclass(frozen=True, slots=True)
class _Usual:
    """What is used where nothing is tuned, of one compute capability."""

    tiles: Tiles
    num_warps: int
    num_stages: int


_AMPERE = _Usual(Tiles(q=128, k=64), num_warps=8, num_stages=3)
_HOPPER = _Usual(Tiles(q=128, k=128), num_warps=8, num_stages=3)


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
    plan: SparsePlan | None = None,
    shard: Shard = WHOLE,
    tiles: Tiles | None = None,
    step: int = 32,
    num_warps: int | None = None,
    num_stages: int | None = None,
    programs: int = PROGRAMS,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """See `api.prefill`. Holds packed columns of a plan, and a list of blocks for each program.

    Args:
        tiles: rows and keys of a step, powers of two of at least 16; a plan's blocks and its
            tiles of queries may be smaller. None for what suits the GPU.
        step: keys of a step that a mask or a border of chunks cuts.
        num_warps: of a program; None for what suits the GPU.
        num_stages: steps of keys in flight; None for what suits the GPU.
        programs: of an attention by a plan, at most.

    Raises:
        Unsupported: if heads are of another size than `TRITON_HEADS`, the cache of another type
            than the queries, or these more than a 32-bit number counts.
    """
    views, T, N, H = queries.shape
    _, K, pages, page, _ = keys.shape
    if H not in TRITON_HEADS:
        raise Unsupported(f"heads of {H}, none of {', '.join(map(str, TRITON_HEADS))}")
    if not queries.dtype == keys.dtype == values.dtype:
        raise Unsupported(
            f"queries, keys and values of types {queries.dtype}, {keys.dtype}, {values.dtype}"
        )
    if T * N * H >= 2**31:
        raise Unsupported(f"{T} queries of {N} x {H} numbers; 32 bits count 2^31")
    usual = _HOPPER if triton_call.capability() >= 90 else _AMPERE
    tiles = tiles or usual.tiles
    G, q = (N // K, T) if plan is None else (1, plan.tiles.q)
    sizes = {
        "T": T,
        "N": N,
        "K": K,
        "H": H,
        "PAGES": pages,
        "PAGE": page,
        "COUNT": shard.count,
        "CHUNK": 0 if geometry is None else geometry.chunk_len,
        "VIEWS": views,
        "BLOCK_M": min(tiles.q, max(triton.next_power_of_2(q * G), LEAST)),
        "STEP": step,
        "num_warps": num_warps or usual.num_warps,
        "num_stages": num_stages or usual.num_stages,
    }
    outputs = [
        jax.ShapeDtypeStruct((T, N, H), queries.dtype),
        jax.ShapeDtypeStruct((T, N), jnp.float32),
    ]
    where = jnp.stack([layer, start, length, *(shard.scalars() or [jnp.int32(0)])])
    args = queries, keys, values, where, page_table
    bounds = functools.partial(_bounds, start=start, length=length, geometry=geometry, shard=shard)
    if plan is None:
        return _launch_dense(args, outputs, bounds, sizes, tiles.k)
    return _launch_sparse(args, outputs, bounds, sizes, tiles.k, plan, programs)


def _launch_dense(args, outputs, bounds, sizes, BLOCK_N):
    K, G, BLOCK_M = sizes["K"], sizes["N"] // sizes["K"], sizes["BLOCK_M"]
    r = jnp.arange(triton.cdiv(sizes["T"] * G, BLOCK_M), dtype=jnp.int32) * BLOCK_M
    tile = BLOCK_N if sizes["PAGE"] % BLOCK_N == 0 else None
    stops, end = bounds(r // G, (r + BLOCK_M - 1) // G, tile=tile)
    stops = jnp.concatenate([stops, end[..., None]], -1)
    bounds = jnp.stack([stops, jnp.broadcast_to(r[:, None], stops.shape)], -1)
    grid = len(r), K
    out, lse = triton_call.launch(
        _dense, *args, bounds, outputs=outputs, grid=grid, BLOCK_N=BLOCK_N, **sizes
    )
    return out, lse


def _launch_sparse(args, outputs, bounds, sizes, BLOCK_N, plan, programs):
    N, count, words = plan.blocks.shape
    V = plan.columns.shape[1]
    q, B, BLOCK_M = plan.tiles.q, plan.tiles.k, sizes["BLOCK_M"]
    BLOCK_N = math.gcd(B, BLOCK_N)
    whole = BLOCK_N >= LEAST  # else blocks are looked up key by key
    BLOCK_N = max(BLOCK_N, LEAST)
    first = jnp.arange(count, dtype=jnp.int32)[:, None] * q
    r = first + jnp.arange(0, q, BLOCK_M, dtype=jnp.int32)
    stops, end = bounds(r, jnp.minimum(r + BLOCK_M, first + q) - 1, tile=B if whole else None)
    blocks = jnp.concatenate([stops, -(-end[..., None] // B)], -1)
    keys = jnp.concatenate([stops * B, end[..., None]], -1)
    columns = jax.vmap(jnp.searchsorted, (0, None))(plan.columns, keys).astype(jnp.int32)
    rows = r[..., None]
    bounds = jnp.stack(jnp.broadcast_arrays(blocks, columns, rows), -1)
    num = min(programs, N * r.size)
    lists = [jax.ShapeDtypeStruct((num, size), jnp.int32) for size in (32 * words, V)]
    out, lse, *_ = triton_call.launch(
        _sparse,
        *args,
        bounds,
        jax.lax.bitcast_convert_type(plan.blocks, jnp.int32),
        plan.columns,
        outputs=[*outputs, *lists],
        grid=(num,),
        V=V,
        NUM_WORDS=words,
        Q=q,
        BLOCK=B,
        BLOCK_N=BLOCK_N,
        LISTED=min(2048, 32 * triton.next_power_of_2(words)),
        **sizes,
    )
    return out, lse


def _bounds(
    first: Int[Array, "*B"],
    last: Int[Array, "*B"],
    *,
    start: Int[Array, ""],
    length: Int[Array, ""],
    tile: int | None,
    geometry: ChunkGeometry | None,
    shard: Shard,
) -> tuple[Int[Array, "*B views"], Int[Array, "*B"]]:
    """Of queries from `first` to `last`: tiles of keys before each region ends, and all keys.

    Args:
        tile: keys, None if there are no whole tiles.
    """

    def of_rows(first, last):
        q_pos = start + jnp.minimum(jnp.stack([first, last]), length - 1)
        kv_len = jnp.where(first < length, start + length, 0)
        found = []
        if tile is not None:
            found = whole_tiles(q_pos, kv_len, tile=tile, geometry=geometry, shard=shard)
        stops = [stop for _, stop in found] or [jnp.int32(0)] * (1 if geometry is None else 3)
        return jnp.stack(stops), shard.before(jnp.minimum(q_pos[1] + 1, kv_len))

    for _ in first.shape:
        of_rows = jax.vmap(of_rows)
    return of_rows(first, last)
