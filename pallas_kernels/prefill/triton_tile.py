"""Flash attention of one tile of queries inside the Triton kernels of prefill.

Row r of a tile is of query r // G and head r % G of the G heads that share its keys; `rows` is
where a tile lies: its first row, one past the last of those that exist, and the kv head. The
state of a row is that of `softmax`, its maximum to base 2. Where a key lies is said as a row of
the cache of a head, which its pages make up.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.triton.keys import LOG2E, START

LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**31 - 1)
"""Position of a key that is not there: after every query."""


@triton.jit
@no_type_check
def start_of(BLOCK_M: tl.constexpr, H: tl.constexpr):
    """The state (maximum, sum, output) of rows that have seen no key."""
    m = tl.full([BLOCK_M], START, tl.float32)
    return m, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, H], tl.float32)


@triton.jit
@no_type_check
def attend(state, logits, value):
    """The state after more keys; logits [BLOCK_M, keys] of pairs that do not count are -inf."""
    m, l, acc = state
    m_new = tl.maximum(m, tl.max(logits, 1) * LOG2E)
    p = tl.exp2(logits * LOG2E - m_new[:, None])
    decay = tl.exp2(m - m_new)
    l = l * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
    return m_new, l, acc


@triton.jit
@no_type_check
def finish(
    state, out, lse, rows, N: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr, H: tl.constexpr
):
    """Write output [T, N, H] and log-sum-exp [T, N]; 0 and -inf of rows that have seen no key."""
    m, l, acc = state
    _, place, there = _rows(rows, N, G, BLOCK_M)
    safe = tl.where(l > 0, l, 1.0)
    at = place[:, None] * H + tl.arange(0, H)
    tl.store(out + at, (acc / safe[:, None]).to(out.dtype.element_ty), there[:, None])
    tl.store(lse + place, tl.where(l > 0, (m + tl.log2(safe)) * LN2, float("-inf")), there)


@triton.jit
@no_type_check
def _rows(rows, N: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """The query of each row, its place among the queries of all heads, and whether it exists."""
    first, stop, head = rows
    r = first + tl.arange(0, BLOCK_M)
    return r // G, r // G * N + head * G + r % G, r < stop


@triton.jit
@no_type_check
def queries_of(
    queries,
    view,
    rows,
    T: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    H: tl.constexpr,
):
    """Rows [BLOCK_M, H] of queries [views, T, N, H]."""
    _, place, there = _rows(rows, N, G, BLOCK_M)
    of_view = queries + tl.cast(view, tl.int64) * (T * N * H)
    return tl.load(of_view + place[:, None] * H + tl.arange(0, H), there[:, None], 0.0)


@triton.jit
@no_type_check
def _at_step(step, high, table, found, PAGE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Start of a step before `high`; anywhere in the cache past it. See `sweep`."""
    if found is not None:
        steps: tl.constexpr = BLOCK // STEP
        return tl.load(found + step // steps, step < high, 0) + step % steps * STEP
    first = tl.where(step < high, step * STEP, 0)
    return tl.load(table + first // PAGE) * PAGE + first % PAGE


@triton.jit
@no_type_check
def sweep(
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
        found: rows at which the blocks of BLOCK keys begin that are read; None for all keys.
    """
    H: tl.constexpr = q.shape[1]
    within = tl.arange(0, STEP)[:, None] * H + tl.arange(0, H)
    # Where a step begins is read in the step before: keys whose address had to be waited for
    # could not be on their way before.
    at = _at_step(low, high, table, found, PAGE, BLOCK, STEP)
    for j in range(low, high):
        here = at * H
        at = _at_step(j + 1, high, table, found, PAGE, BLOCK, STEP)
        logits = tl.dot(q, tl.trans(tl.load(keys + here + within)), input_precision="ieee")
        state = attend(state, logits, tl.load(values + here + within))
    return state


@triton.jit
@no_type_check
def sweep_singles(state, q, num, keys, values, found, STEP: tl.constexpr):
    """Attend to `num` keys that all rows read, in the view of q; `found` says where they are."""
    H: tl.constexpr = q.shape[1]
    i = tl.arange(0, STEP)
    last = tl.maximum(num - 1, 0)
    at = tl.load(found + tl.minimum(i, last), num > 0, 0)
    for first in range(0, num, STEP):
        here = at[:, None] * H + tl.arange(0, H)
        at = tl.load(found + tl.minimum(first + STEP + i, last))
        logits = tl.dot(q, tl.trans(tl.load(keys + here)), input_precision="ieee")
        logits = tl.where((first + i < num)[None, :], logits, float("-inf"))
        state = attend(state, logits, tl.load(values + here))
    return state


@triton.jit
@no_type_check
def sweep_cut(
    state,
    queries,
    rows,
    low,
    high,
    keys,
    values,
    table,
    found,
    block,
    where,
    T: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Attend to keys [low, high) of those read, which a mask or a border of chunks cuts.

    A step makes a product for each view that it needs, which is one but for borders.

    Args:
        found: local keys where blocks of `block` keys begin; None for all keys.
        where: layer, start, length, index of the shard, of COUNT; a part of a page, PAGE, lies
            here.
    """
    start, length, index = tl.load(where + 1), tl.load(where + 2), tl.load(where + 3)
    h = tl.arange(0, H)
    for first in tl.range(low, high, STEP, num_stages=1):
        t = _rows(rows, N, G, BLOCK_M)[0]
        q_pos = start + tl.minimum(t, length - 1)
        oldest, newest = tl.min(q_pos, 0), tl.max(q_pos, 0)
        local = first + tl.arange(0, STEP)
        listed = local < high
        if found is not None:
            local = tl.load(found + local // block, listed, 0) + local % block
        k_pos = tl.where(listed, _position(local, index, PAGE, COUNT), FAR)
        exists = k_pos <= newest
        page = tl.load(table + local // PAGE, exists, 0)
        here = (page * PAGE + local % PAGE)[:, None] * H + h

        near, far = 0, 0
        if CHUNK > 0:
            near = _view(oldest, tl.max(tl.where(exists, k_pos, 0), 0), CHUNK)
            far = _view(newest, tl.min(k_pos, 0), CHUNK)
        logits = tl.full([BLOCK_M, STEP], float("-inf"), tl.float32)
        for view in tl.range(near, far + 1, num_stages=1):
            q = queries_of(queries, view, rows, T, N, G, BLOCK_M, H)
            # Read again for each view, lest they take registers.
            key = tl.load(keys + here, exists[:, None], 0.0)
            begin, end = _run(q_pos, view, CHUNK)
            seen = (k_pos[None, :] >= begin[:, None]) & (k_pos[None, :] < end[:, None])
            logits = tl.where(seen, tl.dot(q, tl.trans(key), input_precision="ieee"), logits)
        # 0 x nan of a stale page is nan.
        state = attend(state, logits, tl.load(values + here, exists[:, None], 0.0))
    return state


@triton.jit
@no_type_check
def _position(local, index, PART: tl.constexpr, COUNT: tl.constexpr):
    """`Shard.position`."""
    if COUNT == 1:
        return local
    return (local // PART * (COUNT - 1) + index) * PART + local


@triton.jit
@no_type_check
def _view(q_pos, k_pos, CHUNK: tl.constexpr):
    """`ChunkGeometry.view`."""
    return tl.minimum(tl.maximum(q_pos // CHUNK - k_pos // CHUNK, 0), 2)


@triton.jit
@no_type_check
def _run(q_pos, view, CHUNK: tl.constexpr):
    """Positions of the keys that queries see in a view: the first, and one past the last."""
    if CHUNK == 0:
        return tl.zeros_like(q_pos), q_pos + 1
    first = (q_pos // CHUNK - view) * CHUNK
    return tl.where(view == 2, 0, first), tl.where(view == 0, q_pos + 1, first + CHUNK)
