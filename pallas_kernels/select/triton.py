"""The vote of a slice's last queries for NVIDIA GPUs: two Triton kernels that stream the keys.

The first finds each row's log-sum-exp, the second adds up the weights by column and by diagonal. A
program of either takes one page for one query head; those of the heads that share keys follow each
other. Rows lie last query first, so that row i of the weights moves by i places to where its
diagonals end in the last query's row: in a tile of keys they turn, and what comes round from the
end belongs to the next one. What falls past a page is handed on by a `Shard`.
"""

import functools
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
from pallas_kernels.triton.keys import LOG2E, START, cut_logits, logits_in_parts

MOST_ROWS = 64
MOST_BYTES = 512  # of a head
TILE = 64  # keys a step: two for each lane of a warp


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
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """Sums of softmax weights by column and by diagonal; see `api.select`.

    What is None is as in `triton_sizes`.

    Args:
        num_stages: tiles of a program that are on their way or in use.

    Raises:
        Unsupported: if no product takes heads of this size, or they are too large, there are more
            than 64 rows, or queries and keys differ in dtype.
    """
    keys = cache.keys
    _, R, N, H = queries.shape
    _, K, pages, page, _ = keys.shape
    P = page_table.shape[0]
    if H not in TRITON_HEADS:
        raise Unsupported(f"head_dim={H} must be one of {', '.join(map(str, TRITON_HEADS))}")
    if H * keys.dtype.itemsize > MOST_BYTES:
        raise Unsupported(
            f"{H=} numbers of {keys.dtype} must be at most {MOST_BYTES} bytes: queries and tiles "
            "of keys share the memory of a block"
        )
    if R > MOST_ROWS:
        raise Unsupported(f"{R=} rows must be at most {MOST_ROWS}: those of one product")
    if queries.dtype != keys.dtype:
        raise Unsupported(f"queries are {queries.dtype}, keys {keys.dtype}; one dtype is needed")
    M = max(1 << (R - 1).bit_length(), 16)
    usual = triton_sizes.select(call.capability())

    row, end = jnp.arange(M, dtype=jnp.int32), start + length
    votes = row < jnp.minimum(R, length)
    # Rows without a vote see what the first that votes sees, and are left out of the sums.
    first = jnp.minimum(jnp.maximum(start, end - R), end - 1)
    seen = row_ends(jnp.maximum(end - 1 - row, first), geometry, shard)

    given = layer.reshape(1), page_table, _views(seen, P, page), seen, queries, keys
    sizes = {"R": R, "N": N, "G": N // K, "H": H, "K": K, "PAGES": pages, "PAGE": page, "P": P}
    sizes |= {"VIEWS": len(seen), "M": M, "TILE": TILE}
    launch = functools.partial(
        call.launch,
        grid=(N * P,),
        num_warps=num_warps or usual.num_warps,
        num_stages=num_stages or usual.num_stages,
        **sizes,
    )
    (lse,) = launch(
        _row_lse,
        *given,
        outputs=[jax.ShapeDtypeStruct((N, P, M), jnp.float32)],
    )
    lse = shard.merge_lse(jax.nn.logsumexp(lse, axis=1))
    lse = jnp.where(votes, lse, jnp.inf)
    columns, diagonals, over = launch(
        _sums,
        *given,
        lse,
        outputs=[
            jax.ShapeDtypeStruct((N, P, page), jnp.float32),
            jax.ShapeDtypeStruct((N, P, page), jnp.float32),
            jax.ShapeDtypeStruct((N, P, R), jnp.float32),
        ],
    )
    diagonals += shard.shift_overflow(over, page)
    return columns.reshape(N, -1), diagonals.reshape(N, -1)


def _views(seen: Int[Array, "views M"], count: int, page: int) -> Int[Array, " P"]:
    """View in which all rows see all of a page; the number of views where a mask or border cuts it.

    Pages without a key count as cut.
    """
    views = len(seen)
    if page % TILE:
        return jnp.full(count, views, jnp.int32)
    first = jnp.arange(count, dtype=jnp.int32) * page
    begin = jnp.append(seen.max(1)[1:], jnp.int32(0))[:, None]
    whole = (begin <= first) & (first + page <= seen.min(1)[:, None])
    return jnp.where(whole.any(0), whole.argmax(0).astype(jnp.int32), views)


@triton.jit
@no_type_check
def _page_of(layer, table, keys, n, number, K, G, PAGES, PAGE, H, TILE: tl.constexpr):
    """Pointers [TILE] to the first keys of a page of the sequence, of a query head."""
    page = (tl.load(layer).to(tl.int64) * K + n // G) * PAGES + tl.load(table + number)
    return keys + page * (PAGE * H) + tl.arange(0, TILE) * H


@triton.jit
@no_type_check
def _row_lse(
    layer,
    table,
    views,
    ends,
    queries,
    keys,
    lse,
    R: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    VIEWS: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Log-sum-exp [N, P, M] of each row over one page."""
    n, number = tl.program_id(0) % N, tl.program_id(0) // N
    row, h = tl.arange(0, M), tl.arange(0, H)
    there = row < R
    queries += ((R - 1 - row) * N + n) * H
    keys = _page_of(layer, table, keys, n, number, K, G, PAGES, PAGE, H, TILE)
    limit = tl.minimum(tl.load(ends), (number + 1) * PAGE)  # of the last row, which sees most
    view = tl.load(views + number)
    whole = tl.where(view < VIEWS, PAGE // TILE, 0)
    cut = tl.where(view < VIEWS, 0, tl.cdiv(tl.maximum(limit - number * PAGE, 0), TILE))
    q_at = queries + view % VIEWS * (R * N * H)
    q = tl.load(q_at[:, None] + h, mask=there[:, None] & (view < VIEWS), other=0)
    every = tl.full((TILE,), True, tl.int1)

    m = tl.full((M,), START, tl.float32)
    l = tl.zeros((M,), tl.float32)
    for t in range(whole):
        if q.dtype == tl.float32:
            logits = logits_in_parts(q_at, there, keys + t * (TILE * H), every, M, TILE, H).T
        else:
            logits = tl.dot(q, tl.load((keys + t * (TILE * H))[:, None] + h).T)
        m, l = _more(m, l, logits)
    for t in range(cut):
        logits = cut_logits(
            queries,
            there,
            ends + row,
            keys + t * (TILE * H),
            number * PAGE + t * TILE,
            limit,
            VIEWS,
            R * N * H,
            M,
            M,
            TILE,
            H,
        )
        m, l = _more(m, l, logits.T)
    found = (m + tl.log2(tl.where(l > 0, l, 1.0))) / LOG2E
    found = tl.where(l > 0, found, float("-inf"))
    tl.store(lse + (n * P + number) * M + row, found)


@triton.jit
@no_type_check
def _more(m, l, logits):
    """Maximum, to base 2, and sum after more keys."""
    m_new = tl.maximum(m, tl.max(logits, 1) * LOG2E)
    p = tl.exp2(logits * LOG2E - m_new[:, None])
    return m_new, tl.exp2(m - m_new) * l + tl.sum(p, 1)


@triton.jit
@no_type_check
def _sums(
    layer,
    table,
    views,
    ends,
    queries,
    keys,
    lse,
    columns,
    diagonals,
    over,
    R: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    VIEWS: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Weights of one page by column and by diagonal, and by diagonal past its end, [N, P, R].

    Args:
        lse: log-sum-exp of each row over all keys, [N, M]; infinite in rows without a vote.
    """
    n, number = tl.program_id(0) % N, tl.program_id(0) // N
    row, h = tl.arange(0, M), tl.arange(0, H)
    there = row < R
    queries += ((R - 1 - row) * N + n) * H
    keys = _page_of(layer, table, keys, n, number, K, G, PAGES, PAGE, H, TILE)
    limit = tl.minimum(tl.load(ends), (number + 1) * PAGE)  # of the last row, which sees most
    view = tl.load(views + number)
    whole = tl.where(view < VIEWS, PAGE // TILE, 0)
    cut = tl.where(view < VIEWS, 0, tl.cdiv(tl.maximum(limit - number * PAGE, 0), TILE))
    q_at = queries + view % VIEWS * (R * N * H)
    q = tl.load(q_at[:, None] + h, mask=there[:, None] & (view < VIEWS), other=0)
    every = tl.full((TILE,), True, tl.int1)
    at = n * P + number
    columns += at.to(tl.int64) * PAGE
    diagonals += at.to(tl.int64) * PAGE
    over += at * R
    lse = tl.load(lse + n * M + row) * LOG2E

    LANES: tl.constexpr = TILE // 2
    carry, later = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for t in range(whole):
        if q.dtype == tl.float32:
            logits = logits_in_parts(q_at, there, keys + t * (TILE * H), every, M, TILE, H)
        else:
            logits = tl.dot(tl.load((keys + t * (TILE * H))[:, None] + h), q.T)
        p = tl.exp2(logits * LOG2E - lse[None, :])
        carry, later = _add_up(p, carry, later, columns, diagonals, over, t, R, PAGE, M, TILE)
    for t in range(cut):
        logits = cut_logits(
            queries,
            there,
            ends + row,
            keys + t * (TILE * H),
            number * PAGE + t * TILE,
            limit,
            VIEWS,
            R * N * H,
            M,
            M,
            TILE,
            H,
        )
        p = tl.exp2(logits * LOG2E - lse[None, :])
        carry, later = _add_up(p, carry, later, columns, diagonals, over, t, R, PAGE, M, TILE)
    # No diagonal ends after the last key, so that nothing is carried this far.
    for t in range(whole + cut, tl.cdiv(PAGE, TILE)):
        place, nothing = t * TILE + tl.arange(0, TILE), tl.zeros((TILE,), tl.float32)
        tl.store(columns + place, nothing, mask=place < PAGE)
        _store(diagonals, over, nothing, place, R, PAGE, TILE)
    place = tl.cdiv(PAGE, TILE) * TILE - PAGE + tl.arange(0, LANES)
    tl.store(over + place, carry, mask=place < R)
    tl.store(over + place + LANES, later, mask=place + LANES < R)


@triton.jit
@no_type_check
def _add_up(
    p,
    carry,
    later,
    columns,
    diagonals,
    over,
    t,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store the sums of the weights [TILE, M] of tile t of a page.

    Row i moves by i places: in groups of keys, one for each lane, it turns by i, which is one
    exchange between lanes, and what comes round the end belongs to the next group.

    Args:
        carry: sums that earlier tiles contribute to the first group.
        later: sums that they contribute to the second one.

    Returns:
        The same for the next tile.
    """
    LANES: tl.constexpr = TILE // 2
    place = t * TILE + tl.arange(0, TILE)
    tl.store(columns + place, tl.sum(p, 1), mask=place < PAGE)
    row, lane = tl.arange(0, M)[None, :], tl.arange(0, LANES)[:, None]
    turn = tl.broadcast_to(((lane - row) & (LANES - 1))[None], (2, LANES, M))
    turned = tl.gather(tl.reshape(p, (2, LANES, M)), turn, 1)
    past = ((row - lane + LANES - 1) // LANES)[None]
    first, second = _two_sums(turned, past == 0)
    first_1, second_1 = _two_sums(turned, past == 1)
    first_2, second_2 = _two_sums(turned, past == 2)
    place = t * TILE + tl.arange(0, LANES)
    _store(diagonals, over, first + carry, place, R, PAGE, TILE)
    _store(diagonals, over, second + first_1 + later, place + LANES, R, PAGE, TILE)
    return second_1 + first_2, second_2


@triton.jit
@no_type_check
def _two_sums(weights, chosen):
    """Sums of the chosen weights over rows, of each group of keys."""
    return tl.split(tl.sum(tl.where(chosen, weights, 0.0), 2).permute(1, 0))


@triton.jit
@no_type_check
def _store(diagonals, over, sums, place, R, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Store sums along diagonals at places of a page, and those that fall past it."""
    tl.store(diagonals + place, sums, mask=place < PAGE)
    if PAGE % TILE != 0:
        past = place - PAGE
        tl.store(over + past, sums, mask=(past >= 0) & (past < R))
