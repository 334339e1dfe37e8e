"""Prefill for NVIDIA GPUs: Triton kernels, dense and by a plan, over the paged cache where it lies.

A program attends for a tile of rows, in steps of keys that each lie in one page. Without a plan
the heads of a kv head join the rows of a tile; with one a tile has one head. The keys of a tile
fall into the three regions of Dual Chunk Attention, each with one view of its queries: a loop over
each region does nothing but attend, and what a mask or a border of chunks cuts goes last, in the
views that it needs. Where these loops end is computed outside, a few numbers a tile.

The blocks of a plan are bits and a loop that reads ahead cannot search, so a program first lists
where the blocks of its tile lie, and the single columns that none of them covers. Lists belong to
programs, each of which takes many tiles in turn, so that they do not grow with the slice; there
are several programs for each place on a GPU, lest some places be idle at the end. Columns are read
where they lie: a key fills whole lines of the cache, and a packed copy of those of all heads would
be larger than the lists. `triton_tile` attends.
"""

import functools
import math
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import triton_sizes
from pallas_kernels.dispatch.backend import TRITON_HEADS, Unsupported
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import SparsePlan
from pallas_kernels.prefill.triton_tile import (
    finish,
    queries_of,
    start_of,
    sweep,
    sweep_cut,
    sweep_singles,
)
from pallas_kernels.regions import tile_ends
from pallas_kernels.shard import WHOLE, Shard
from pallas_kernels.triton import call

LEAST = 16  # rows and keys of a product on tensor cores
LEAST_STEPS = 32  # of keys, of a program that has a part of them
PROGRAMS = 1024
LISTED = 1024  # blocks or columns looked at together
APART = 64  # keys of a step that lie apart, at most: their addresses take registers


def prefill(
    queries: Float[Array, "views T N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    plan: SparsePlan | None = None,
    shard: Shard = WHOLE,
    tiles: Tiles | None = None,
    step: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    programs: int = PROGRAMS,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """See `api.prefill`. With a plan it holds lists of a head's blocks and columns a program.

    What is None is as in `triton_sizes`.

    Args:
        tiles: rows, and keys of a step that no mask cuts, powers of two from 16 on; of a plan
            at most, whose own tiles these cut up.
        step: keys of a step that a mask or a border of chunks cuts.
        num_warps: warps per program.
        num_stages: steps whose keys are in flight.
        programs: programs that share a plan's tiles; without a plan, keys are split between
            programs until there are so many.

    Raises:
        Unsupported: if the heads are of no size in `TRITON_HEADS`, the cache of another type
            than the queries, or these or the keys of a head more than 32 bits count.
    """
    keys, values = cache.keys, cache.values
    views, T, N, H = queries.shape
    _, K, pages, page, _ = keys.shape
    if H not in TRITON_HEADS:
        raise Unsupported(f"heads of {H} are none of {', '.join(map(str, TRITON_HEADS))}")
    if not queries.dtype == keys.dtype == values.dtype:
        raise Unsupported(f"queries of {queries.dtype}, keys of {keys.dtype}: not of one type")
    if max(T * N, pages * page) * H >= 2**31:
        raise Unsupported(
            f"{T} x {N} queries or {pages * page} keys of {H} numbers: more than 32 bits count"
        )
    usual = triton_sizes.prefill(call.capability(), keys.dtype.itemsize, H, sparse=plan is not None)
    tiles = tiles or usual.tiles
    rows = T * (N // K) if plan is None else plan.tiles.q
    constants = {
        "T": T,
        "N": N,
        "K": K,
        "H": H,
        "PAGES": pages,
        "PAGE": page,
        "COUNT": shard.count,
        "CHUNK": 0 if geometry is None else geometry.chunk_len,
        "VIEWS": views,
        "BLOCK_M": min(tiles.q, max(triton.next_power_of_2(rows), LEAST)),
        "STEP": step or usual.step,
        "num_warps": num_warps or usual.num_warps,
        "num_stages": num_stages or usual.num_stages,
    }
    where = jnp.stack([layer, start, length, *(shard.scalars() or [jnp.int32(0)])])
    args = queries, keys, values, where, page_table
    bounds = functools.partial(
        tile_ends, start=start, length=length, geometry=geometry, shard=shard
    )
    if plan is None:
        return _launch_dense(args, bounds, tiles.k, programs, constants)
    return _launch_sparse(args, bounds, tiles.k, programs, constants, plan)


def _launch_dense(args, bounds, BLOCK_N: int, programs: int, constants: dict[str, Any]):
    queries, *_, page_table = args
    _, T, N, H = queries.shape
    K, page, BLOCK_M = (constants[name] for name in ("K", "PAGE", "BLOCK_M"))
    G = N // K
    first = jnp.arange(triton.cdiv(T * G, BLOCK_M), dtype=jnp.int32) * BLOCK_M
    whole = BLOCK_N if page % BLOCK_N == 0 else None
    stops, end = bounds(first // G, (first + BLOCK_M - 1) // G, whole)

    # Few tiles share out their keys, lest most of the GPU be idle.
    most = page_table.size * page // (LEAST_STEPS * BLOCK_N)
    parts = max(min(programs // (len(first) * K), most), 1)
    borders = -(-end // BLOCK_N) * jnp.arange(parts + 1, dtype=jnp.int32)[:, None] // parts
    low, high = borders[:-1, :, None], borders[1:, :, None]
    ends = jnp.clip(stops, low, high), jnp.minimum(end[:, None], high * BLOCK_N)
    table = jnp.concatenate([low, *ends], -1)
    dtype = queries.dtype if parts == 1 else jnp.float32
    out, lse = call.launch(
        _dense,
        *args,
        jnp.stack(jnp.broadcast_arrays(table, first[:, None]), -1),
        outputs=[
            jax.ShapeDtypeStruct((parts, T, N, H), dtype),
            jax.ShapeDtypeStruct((parts, T, N), jnp.float32),
        ],
        grid=(len(first), K, parts),
        BLOCK_N=BLOCK_N,
        **constants,
    )
    if parts == 1:
        return out[0], lse[0]
    total = jax.nn.logsumexp(lse, axis=0)
    weights = jnp.where(lse > -jnp.inf, jnp.exp(lse - total), 0)
    return (weights[..., None] * out).sum(0).astype(queries.dtype), total


def _launch_sparse(
    args, bounds, most: int, programs: int, constants: dict[str, Any], plan: SparsePlan
):
    queries = args[0]
    _, T, N, H = queries.shape
    _, count, words = plan.blocks.shape
    V, BLOCK_M, q, B = plan.columns.shape[1], constants["BLOCK_M"], plan.tiles.q, plan.tiles.k
    BLOCK_N = math.gcd(B, min(most, APART))
    whole = B if BLOCK_N >= LEAST else None
    tile = jnp.arange(count, dtype=jnp.int32)[:, None] * q
    first = tile + jnp.arange(0, q, BLOCK_M, dtype=jnp.int32)
    stops, end = bounds(first, jnp.minimum(first + BLOCK_M, tile + q) - 1, whole)
    end = end[..., None]
    blocks = jnp.concatenate([stops, -(-end // B)], -1)
    keys = jnp.concatenate([stops * B, end], -1)
    # Without a loop, whose steps would each be a program on the GPU.
    before = functools.partial(jnp.searchsorted, method="scan_unrolled")
    columns = jax.vmap(before, (0, None))(plan.columns, keys).astype(jnp.int32)
    programs = min(programs, N * first.size)
    out, lse, *_ = call.launch(
        _sparse,
        *args,
        jnp.stack(jnp.broadcast_arrays(blocks, columns, first[..., None]), -1),
        jax.lax.bitcast_convert_type(plan.blocks, jnp.int32),
        plan.columns,
        outputs=[
            jax.ShapeDtypeStruct((T, N, H), queries.dtype),
            jax.ShapeDtypeStruct((T, N), jnp.float32),
            jax.ShapeDtypeStruct((programs, 32 * words), jnp.int32),
            jax.ShapeDtypeStruct((programs, V), jnp.int32),
            jax.ShapeDtypeStruct((programs, constants["VIEWS"] + 1, 2), jnp.int32),
        ],
        grid=(programs,),
        V=V,
        WORDS=words,
        Q=q,
        BLOCK=B,
        BLOCK_N=max(BLOCK_N, LEAST),
        LISTED=min(LISTED, 32 * triton.next_power_of_2(words)),
        **constants,
    )
    return out, lse


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
    """A tile of rows of a kv head over a part of all keys.

    Args:
        where: layer, start, length, index of the shard.
        bounds: [parts, tiles, VIEWS + 2, 2], the step where the part begins, the step where each
            region ends, the key where the part ends; with each the first row of the tile, for
            rows that are computed from a number just read take no registers before.
        out: [parts, T, N, H], and lse [parts, T, N].
    """
    G: tl.constexpr = N // K
    head, part = tl.program_id(1), tl.program_id(2)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    bound = bounds + (part * tl.num_programs(0) + tile) * 2 * (VIEWS + 2)
    layer = tl.load(where)
    keys += (layer * K + head).to(tl.int64) * (PAGES * PAGE * H)
    values += (layer * K + head).to(tl.int64) * (PAGES * PAGE * H)
    out += part.to(tl.int64) * (T * N * H)
    lse += part.to(tl.int64) * (T * N)

    state = start_of(BLOCK_M, H)
    low = tl.load(bound)
    for region in range(VIEWS):
        high = tl.load(bound + 2 * region + 2)
        rows = tl.load(bound + 2 * region + 3), T * G, head
        q = queries_of(queries, VIEWS - 1 - region, rows, T, N, G, BLOCK_M, H)
        state = sweep(state, q, low, high, keys, values, table, None, PAGE, 0, BLOCK_N)
        low = high
    rows = tl.load(bound + 2 * VIEWS + 3), T * G, head
    state = sweep_cut(
        state,
        queries,
        rows,
        low * BLOCK_N,
        tl.load(bound + 2 * VIEWS + 2),
        keys,
        values,
        table,
        None,
        1,
        where,
        T,
        N,
        G,
        BLOCK_M,
        H,
        PAGE,
        COUNT,
        CHUNK,
        STEP,
    )
    rows = tl.load(bound + 1), T * G, head
    finish(state, out, lse, rows, N, G, BLOCK_M, H)


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
    list_lengths,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    WORDS: tl.constexpr,
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
    """Tiles of queries of a head over the blocks and columns that their row of a plan reads.

    Args:
        where: layer, start, length, index of the shard.
        bounds: [N, tiles, parts, VIEWS + 1, 3], of each part of a tile of the plan: the
            block and the column where each region ends, then where all do; with each the first
            row, as in `_dense`.
        words: bits of the plan's blocks, [N, tiles, WORDS].
        block_lists: [programs, 32 WORDS], and column_lists [programs, V]: of a region from its
            first block or column on. What a mask cuts is listed by local keys, all else by rows
            of the cache. list_lengths [programs, VIEWS + 1, 2] says how many are listed.
    """
    PARTS: tl.constexpr = (Q + BLOCK_M - 1) // BLOCK_M
    TILES: tl.constexpr = (T + Q - 1) // Q * PARTS
    blocks = block_lists + tl.program_id(0) * (32 * WORDS)
    singles = column_lists + tl.program_id(0) * V
    nums = list_lengths + tl.program_id(0) * 2 * (VIEWS + 1)
    # What every tile computes anew takes no registers between.
    for number in tl.range(tl.program_id(0), N * TILES, tl.num_programs(0), disable_licm=True):
        head, tile = number // TILES, TILES - 1 - number % TILES  # the longest of a head first
        stop = tl.minimum((tile // PARTS + 1) * Q, T)
        bound = bounds + (head * TILES + tile) * 3 * (VIEWS + 1)
        bits = words + (head * (TILES // PARTS) + tile // PARTS) * WORDS
        of_head = columns + head * V
        cache = (tl.load(where) * K + head // (N // K)).to(tl.int64) * (PAGES * PAGE * H)

        tl.debug_barrier()  # all have read what was listed before
        block, column = 0, 0
        for part in range(VIEWS + 1):
            to_block, to_column = tl.load(bound + 3 * part), tl.load(bound + 3 * part + 1)
            in_cache = part < VIEWS
            num = _list_blocks(
                blocks + block, bits, block, to_block, table, in_cache, PAGE, BLOCK, LISTED
            )
            num_singles = _list_columns(
                singles + column,
                bits,
                of_head,
                column,
                to_column,
                table,
                in_cache,
                PAGE,
                BLOCK,
                LISTED,
            )
            tl.store(nums + 2 * part, num)
            tl.store(nums + 2 * part + 1, num_singles)
            block, column = to_block, to_column
        tl.debug_barrier()

        state = start_of(BLOCK_M, H)
        block, column = 0, 0
        if BLOCK % BLOCK_N == 0:
            for region in range(VIEWS):
                rows = tl.load(bound + 3 * region + 2), stop, head
                q = queries_of(queries, VIEWS - 1 - region, rows, T, N, 1, BLOCK_M, H)
                state = sweep(
                    state,
                    q,
                    0,
                    tl.load(nums + 2 * region) * (BLOCK // BLOCK_N),
                    keys + cache,
                    values + cache,
                    table,
                    blocks + block,
                    PAGE,
                    BLOCK,
                    BLOCK_N,
                )
                state = sweep_singles(
                    state,
                    q,
                    tl.load(nums + 2 * region + 1),
                    keys + cache,
                    values + cache,
                    singles + column,
                    BLOCK_N,
                )
                block, column = tl.load(bound + 3 * region), tl.load(bound + 3 * region + 1)
        rows = tl.load(bound + 3 * VIEWS + 2), stop, head
        for singly in range(2):
            num = tl.load(nums + 2 * VIEWS + singly)
            state = sweep_cut(
                state,
                queries,
                rows,
                0,
                tl.where(singly > 0, num, num * BLOCK),
                keys + cache,
                values + cache,
                table,
                tl.where(singly > 0, singles + column, blocks + block),
                tl.where(singly > 0, 1, BLOCK),
                where,
                T,
                N,
                1,
                BLOCK_M,
                H,
                PAGE,
                COUNT,
                CHUNK,
                STEP,
            )
        rows = tl.load(bound + 2), stop, head
        finish(state, out, lse, rows, N, 1, BLOCK_M, H)


@triton.jit
@no_type_check
def _list_blocks(
    found,
    bits,
    low,
    high,
    table,
    in_cache,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
):
    """List where the blocks [low, high) begin whose bits are set; see `_append`."""
    count = 0
    for first in range(low, high, LISTED):
        block = first + tl.arange(0, LISTED)
        word = tl.load(bits + block // 32, block < high, 0)
        keep = (word >> (block % 32)) & 1 == 1
        count = _append(found, count, block * BLOCK, keep, table, in_cache, PAGE)
    return count


@triton.jit
@no_type_check
def _list_columns(
    found,
    bits,
    columns,
    low,
    high,
    table,
    in_cache,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
):
    """List where those columns [low, high) are that lie in no block whose bit is set."""
    count = 0
    for first in range(low, high, LISTED):
        i = first + tl.arange(0, LISTED)
        column = tl.load(columns + i, i < high, 0)
        word = tl.load(bits + column // (32 * BLOCK), i < high, -1)
        keep = (word >> (column // BLOCK % 32)) & 1 == 0
        count = _append(found, count, column, keep, table, in_cache, PAGE)
    return count


@triton.jit
@no_type_check
def _append(found, count, local, keep, table, in_cache, PAGE: tl.constexpr):
    """Add local keys to the `count` that are found, or the rows of the cache where they lie."""
    row = tl.load(table + local // PAGE, keep, 0) * PAGE + local % PAGE
    chosen = keep.to(tl.int32)
    place = count + tl.cumsum(chosen, 0) - chosen
    tl.store(found + place, tl.where(in_cache, row, local), keep)
    return count + tl.sum(chosen, 0)
