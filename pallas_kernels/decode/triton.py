"""Decode for NVIDIA GPUs in Triton: split-KV flash decoding of paged keys.

All sequences are cut into runs of about equal length, as many as keep the GPU busy; a program
streams one of them once, for all query heads and tokens of a kv head, which are the rows of one
product. A tile of keys that all rows see in one view of Dual Chunk Attention (arXiv:2402.17463)
is nothing but loads and two products; those that a mask or a border of chunks cuts take longer.
A second kernel merges the runs of each row. It is a kernel, not XLA operations, since how many
there are of a sequence is known at run time only, and since each of many would be launched.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import triton_sizes
from pallas_kernels.dispatch.backend import TRITON_HEADS, Unsupported
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.regions import row_ends
from pallas_kernels.shard import WHOLE, Shard
from pallas_kernels.triton import call
from pallas_kernels.triton.keys import LOG2E, START, cut_logits, keys_at, pages_of

MOST_ROWS = 64  # of a program
CUT = 16  # keys a step where a tile is cut
MERGED = 32  # runs a step of the merge


def decode(
    queries: Float[Array, "views B Q N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, "B P"],
    positions: Int[Array, "B Q"],
    *,
    geometry: ChunkGeometry | None,
    shard: Shard = WHOLE,
    tile: int | None = None,
    programs: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B Q N"]]:
    """See `api.decode`. What is None is as in `triton_sizes`.

    Args:
        tile: keys a step, a power of two.
        programs: programs that stream keys at a time, over all heads.
        num_stages: tiles of a program that are on their way or in use.

    Raises:
        Unsupported: if no product takes heads of this size, or dtypes differ.
    """
    keys, values = cache.keys, cache.values
    _, B, Q, N, H = queries.shape
    _, K, pages, page, _ = keys.shape
    if H not in TRITON_HEADS:
        raise Unsupported(f"head_dim={H} must be one of {', '.join(map(str, TRITON_HEADS))}")
    if not queries.dtype == keys.dtype == values.dtype:
        raise Unsupported(
            f"queries are {queries.dtype}, keys {keys.dtype}, values {values.dtype}; one dtype is "
            "needed"
        )
    G, P = N // K, page_table.shape[1]
    rows = Q * G
    M = min(max(_power_of_two(rows), 16), MOST_ROWS)
    usual = triton_sizes.decode(call.capability(), keys.dtype.itemsize, H)
    tile, num_stages = tile or usual.tile, num_stages or usual.num_stages
    # Runs of less than a few tiles would end before their pipeline is full.
    least = num_stages
    wanted = -(-(programs or usual.programs) // K)
    runs = min(wanted + B, B * -(-P * page // (tile * least)))

    seen = row_ends(positions, geometry, shard)
    sizes = {"B": B, "Q": Q, "N": N, "G": G, "H": H, "TILE": tile}
    sizes |= {"SEQUENCES": _power_of_two(B), "WANTED": wanted, "LEAST": least}
    paged = {"VIEWS": len(seen), "K": K, "PAGES": pages, "PAGE": page, "P": P}
    partial, partial_lse = call.launch(
        _attend,
        *(layer.reshape(1), page_table, seen, queries, keys, values),
        outputs=[
            jax.ShapeDtypeStruct((runs, K, rows, H), jnp.float32),
            jax.ShapeDtypeStruct((runs, K, rows), jnp.float32),
        ],
        grid=(runs, K, -(-rows // M)),
        num_warps=num_warps or usual.num_warps,
        num_stages=num_stages,
        **sizes,
        **paged,
        M=M,
        CUT=CUT,
    )
    out, lse = call.launch(
        _merge,
        *(seen, partial, partial_lse),
        outputs=[
            jax.ShapeDtypeStruct((B, Q, N, H), queries.dtype),
            jax.ShapeDtypeStruct((B, Q, N), jnp.float32),
        ],
        grid=(N, Q, B),
        num_warps=4,
        num_stages=2,
        **sizes,
        MERGED=MERGED,
    )
    return out, lse


def _power_of_two(least: int) -> int:
    """Return the smallest power of two that is at least this."""
    return 1 << (least - 1).bit_length()


@triton.jit
@no_type_check
def _shares(
    ends,
    B: tl.constexpr,
    Q: tl.constexpr,
    SEQUENCES: tl.constexpr,
    TILE: tl.constexpr,
    WANTED: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Tiles of each sequence, runs that it is cut into, and their running sum."""
    b = tl.arange(0, SEQUENCES)
    keys = tl.zeros((SEQUENCES,), tl.int32)
    for t in range(Q):
        keys = tl.maximum(keys, tl.load(ends + b * Q + t, mask=b < B, other=0))
    tiles = tl.cdiv(keys, TILE)
    count = tl.cdiv(tiles, tl.maximum(tl.cdiv(tl.sum(tiles), WANTED), LEAST))
    return tiles, count, tl.cumsum(count)


@triton.jit
@no_type_check
def _bounds(ends, view, B: tl.constexpr, Q: tl.constexpr):
    """Ends of the keys that all tokens of a sequence see in a view, and that any of them sees.

    A token that sees none reads what the others read, and is empty in the end.
    """
    whole, cut = 2**31 - 1, 0
    for t in range(Q):
        end = tl.load(ends + view * (B * Q) + t)
        whole = tl.where(tl.load(ends + t) > 0, tl.minimum(whole, end), whole)
        cut = tl.maximum(cut, end)
    return whole, cut


@triton.jit
@no_type_check
def _of(x, b, SEQUENCES: tl.constexpr):
    """Select element b of x."""
    return tl.sum(tl.where(tl.arange(0, SEQUENCES) == b, x, 0))


@triton.jit
@no_type_check
def _update(m, l, acc, logits, v):
    """The state of an online softmax in base 2 after the keys of these logits and values."""
    m_new = tl.maximum(m, tl.max(logits, 1) * LOG2E)
    p = tl.exp2(logits * LOG2E - m_new[:, None])
    decay = tl.exp2(m - m_new)
    l = decay * l + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, decay[:, None] * acc, input_precision="ieee")
    return m_new, l, acc


@triton.jit
@no_type_check
def _attend(
    layer,
    table,
    ends,
    queries,
    keys,
    values,
    out,
    lse,
    B: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    VIEWS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    CUT: tl.constexpr,
    WANTED: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Output [runs, K, Q x G, H] and log-sum-exp, in base 2, of one run of keys."""
    run, k = tl.program_id(0), tl.program_id(1)
    tiles, count, upto = _shares(ends, B, Q, SEQUENCES, TILE, WANTED, LEAST)
    b = tl.sum((upto <= run).to(tl.int32))
    if b >= B:
        return
    tiles, count = _of(tiles, b, SEQUENCES), _of(count, b, SEQUENCES)
    run_of_b = run - (_of(upto, b, SEQUENCES) - count)
    done, last = run_of_b * tiles // count * TILE, (run_of_b + 1) * tiles // count * TILE

    row, h = tl.program_id(2) * M + tl.arange(0, M), tl.arange(0, H)
    there = row < Q * G
    queries += ((b * Q + row // G) * N + k * G + row % G) * H
    ends += b * Q
    table += b * P
    pages = (tl.load(layer).to(tl.int64) * K + k) * (PAGES * PAGE) * H
    keys += pages
    values += pages
    _, limit = _bounds(ends, 0, B, Q)

    m = tl.full((M,), START, tl.float32)
    l = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, H), tl.float32)
    for i in tl.range(VIEWS, num_stages=1):
        view = VIEWS - 1 - i
        whole, cut = _bounds(ends, view, B, Q)
        q_at = queries + view * (B * Q * N * H)
        q = tl.load(q_at[:, None] + h, mask=there[:, None], other=0)
        stop = tl.minimum(tl.maximum(whole // TILE * TILE, done), last)
        page = pages_of(table, done, limit, PAGE, TILE)
        for first in range(done, stop, TILE):
            key = tl.load(keys_at(keys, page, first, PAGE, TILE, H)[:, None] + h)
            value = tl.load(keys_at(values, page, first, PAGE, TILE, H)[:, None] + h)
            logits = tl.dot(q, key.T, input_precision="ieee")
            m, l, acc = _update(m, l, acc, logits, value)
            page = pages_of(table, first + TILE, limit, PAGE, TILE)
        done = stop
        stop = tl.minimum(tl.maximum(tl.cdiv(cut, TILE) * TILE, done), last)
        for first in range(done, stop, CUT):
            page = pages_of(table, first, limit, PAGE, CUT)
            at = keys_at(keys, page, first, PAGE, CUT, H)
            logits = cut_logits(
                queries,
                there,
                ends + row // G,
                at,
                first,
                limit,
                VIEWS,
                B * Q * N * H,
                B * Q,
                M,
                CUT,
                H,
            )
            at = keys_at(values, page, first, PAGE, CUT, H)
            exists = first + tl.arange(0, CUT) < limit
            value = tl.load(at[:, None] + h, mask=exists[:, None], other=0)
            m, l, acc = _update(m, l, acc, logits.T, value)
        done = stop

    seen = l > 0
    l = tl.where(seen, l, 1.0)
    row += (run * K + k) * (Q * G)
    tl.store(out + row[:, None] * H + h[None, :], acc / l[:, None], mask=there[:, None])
    tl.store(lse + row, tl.where(seen, m + tl.log2(l), float("-inf")), mask=there)


@triton.jit
@no_type_check
def _merge(
    ends,
    partial,
    partial_lse,
    out,
    lse,
    B: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    SEQUENCES: tl.constexpr,
    TILE: tl.constexpr,
    WANTED: tl.constexpr,
    LEAST: tl.constexpr,
    MERGED: tl.constexpr,
):
    """One row: a query head of a token."""
    n, t, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, count, upto = _shares(ends, B, Q, SEQUENCES, TILE, WANTED, LEAST)
    last = _of(upto, b, SEQUENCES)
    h = tl.arange(0, H)
    m, l = START, 0.0
    acc = tl.zeros((H,), tl.float32)
    for i in range(last - _of(count, b, SEQUENCES), last, MERGED):
        run = i + tl.arange(0, MERGED)
        row = (run * (N // G) + n // G) * (Q * G) + t * G + n % G
        there = run < last
        run_lse = tl.load(partial_lse + row, mask=there, other=float("-inf"))
        m_new = tl.maximum(m, tl.max(run_lse))
        weight = tl.exp2(run_lse - m_new)
        decay = tl.exp2(m - m_new)
        l = decay * l + tl.sum(weight)
        of_run = tl.load(partial + row[:, None] * H + h[None, :], mask=there[:, None], other=0)
        acc = decay * acc + tl.sum(weight[:, None] * of_run, 0)
        m = m_new
    token = b * Q + t
    seen = tl.load(ends + token) > 0  # no key of this shard, or no token
    l = tl.where(seen, l, 1.0)
    result = tl.where(seen, acc / l, 0.0)
    tl.store(out + (token * N + n) * H + h, result.to(out.dtype.element_ty))
    found = (m + tl.log2(l)) / LOG2E
    tl.store(lse + token * N + n, tl.where(seen, found, float("-inf")))
