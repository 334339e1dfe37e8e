"""Parts of Triton kernels that stream all keys: addresses, and logits that a mask cuts."""

from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
START = tl.constexpr(-1e30)
"""A running maximum before the first key; masked logits are -inf, and -inf - -inf is nan."""


@triton.jit
@no_type_check
def pages_of(table, first, limit, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Numbers of the page of TILE local keys from `first` on, or of each one's, before `limit`.

    A loop that streams keys asks for those of its next step. If a step waited for them, none
    of its keys could be on their way before.
    """
    if PAGE % TILE == 0:
        return tl.load(table + tl.minimum(first, limit - 1) // PAGE)
    else:
        key = first + tl.arange(0, TILE)
        return tl.load(table + key // PAGE, mask=key < limit, other=0)


@triton.jit
@no_type_check
def keys_at(cache, pages, first, PAGE: tl.constexpr, TILE: tl.constexpr, H: tl.constexpr):
    """Pointers [TILE] to local keys from `first` on, in the cache of a head, by `pages_of`."""
    i = tl.arange(0, TILE)
    if PAGE % TILE == 0:
        return cache + (pages.to(tl.int64) * PAGE + first % PAGE) * H + i * H
    else:
        return cache + (pages.to(tl.int64) * PAGE + (first + i) % PAGE) * H


@triton.jit
@no_type_check
def logits_in_parts(
    queries, there, keys, exist, M: tl.constexpr, TILE: tl.constexpr, H: tl.constexpr
):
    """Logits [TILE, M] of keys, in small parts of a head: few registers, but all is read again.

    A product of float32, which tensor cores do not make, holds all that it sums over in registers.

    Args:
        queries: pointers [M] to the rows, of which `there` says which there are.
        keys: pointers [TILE], likewise `exist`.
    """
    h = tl.arange(0, 16)
    logits = tl.zeros((TILE, M), tl.float32)
    for part in tl.range(0, H, 16, num_stages=1):
        q = tl.load((queries + part)[:, None] + h, mask=there[:, None], other=0)
        k = tl.load((keys + part)[:, None] + h, mask=exist[:, None], other=0)
        logits = tl.dot(k, q.T, logits, input_precision="ieee")
    return logits


@triton.jit
@no_type_check
def cut_logits(
    queries,
    there,
    ends,
    keys,
    first,
    limit,
    VIEWS: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    H: tl.constexpr,
):
    """Logits [TILE, M] of keys that a mask or a border of chunks cuts; -inf where a row sees none.

    In parts, lest this rare code ask for more registers than the loop over whole tiles beside it.

    Args:
        queries: pointers [M] to the first view of the rows, `QUERIES` before the next one.
        there: which rows there are.
        ends: pointers [M] to what `regions.row_ends` returns, `ROWS` before those of the next view.
        keys: pointers [TILE].
        first: index of the first of these keys.
        limit: end of these keys.
    """
    key = first + tl.arange(0, TILE)
    logits = tl.full((TILE, M), float("-inf"), tl.float32)
    for view in tl.range(VIEWS, num_stages=1):
        q_at = queries + view * QUERIES
        scores = logits_in_parts(q_at, there, keys, key < limit, M, TILE, H)
        stop = tl.minimum(tl.load(ends + view * ROWS, mask=there, other=0), limit)
        logits = tl.where(key[:, None] < stop[None, :], scores, logits)
    return logits
