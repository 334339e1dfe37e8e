"""Decode for Hopper GPUs: split-KV flash decoding of paged keys, streamed by TMA.

The tiles of keys of all busy sequences and kv heads, in order, are one list, of which each block,
one a core, takes an equal run. A warpgroup copies them where they lie in the cache into a ring of
stages, and two others take them in turn; each merges its own into a running softmax and writes it
where the run leaves a head. All query heads and tokens of a kv head are rows of one product, filled
up to the 64 that it has. A tile that all rows see in one view of Dual Chunk Attention
(arXiv:2402.17463) takes two products and no mask; one that a mask or a border of chunks cuts takes
a product for each view that it needs. A second kernel merges what was written of each row.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import tiles
from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.mosaic_gpu import call
from pallas_kernels.mosaic_gpu.call import BLOCK, ROWS, TILED, WARPGROUP, Warpgroup
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.regions import row_ends
from pallas_kernels.shard import WHOLE, Shard

TILE = 64  # keys a step
HEAD = 128  # numbers, one for each thread of a warpgroup that merges
MOST_ROWS = 64  # of a product
CONSUMERS = 2  # warpgroups that take tiles in turn
STAGES = 4  # tiles on their way or in use
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40  # a thread, of 65,536 a core
BLOCKS = 132  # cores of an H100 and an H200
MERGED = 8  # results a step of the merge
LOG2E = math.log2(math.e)
START = -1e30
"""A running maximum before the first key; masked logits are -inf, and -inf - -inf is nan."""
THREADS = plgpu.Layout.WG_STRIDED((HEAD,), vec_size=1)
"""Layout of a vector with a number for each thread."""


class Schedule(NamedTuple):
    """Assignment of tiles to thread blocks, and where each writes its partial results.

    A unit is a kv head and as many rows as one product has. The list holds the tiles of the first
    busy sequence, unit after unit, then those of the next one. Block c writes what consumer w makes
    of unit u of the i-th busy sequence to place `(c + i * units + u) * CONSUMERS + w`.

    Attributes:
        bounds: index in the list at which the run of each block begins, and the end of the last.
        first: which of the busy sequences each block begins with.
        order: the busy sequences, then the others.
        tiles: number of tiles of a unit of each sequence.
        before: tiles of a unit of all sequences before each.
        begin: the first place of each unit.
        end: the place after its last.
    """

    bounds: Int[Array, " blocks+1"]
    first: Int[Array, " blocks"]
    order: Int[Array, " B"]
    tiles: Int[Array, " B"]
    before: Int[Array, " B"]
    begin: Int[Array, "B units"]
    end: Int[Array, "B units"]


def decode(
    queries: Float[Array, "views B Q N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, "B P"],
    positions: Int[Array, "B Q"],
    *,
    geometry: ChunkGeometry | None,
    shard: Shard = WHOLE,
    blocks: int = BLOCKS,
    stages: int = STAGES,
    interpret: Any = None,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B Q N"]]:
    """See `api.decode`.

    Args:
        blocks: thread blocks that run at a time, one per core.
        stages: a multiple of `CONSUMERS`, so that each takes every tile of its stages.

    Raises:
        Unsupported: if heads are not of 128, arrays not of one dtype of 16 bits, or pages not
            made of whole tiles.
    """
    keys, values = cache.keys, cache.values
    _, B, Q, N, H = queries.shape
    _, K, pages, page, _ = keys.shape
    if H != HEAD:
        raise Unsupported(f"head_dim={H} must be {HEAD}")
    if not queries.dtype == keys.dtype == values.dtype or keys.dtype.itemsize != 2:
        raise Unsupported(
            f"queries are {queries.dtype}, keys {keys.dtype}, values {values.dtype}; one dtype of "
            "16 bits is needed"
        )
    if page % TILE:
        raise Unsupported(f"{page=} must be a multiple of {TILE}: a step copies its keys at once")
    G = N // K
    parts, M = tiles.split(Q * G, MOST_ROWS)
    M = -(-M // 8) * 8  # shared memory is tiled by rows of 8
    units = K * parts

    seen = row_ends(positions, geometry, shard)
    busy = seen[:1] > 0
    whole = jnp.where(busy, seen, jnp.iinfo(jnp.int32).max).min(2)
    cut = seen.max(2)
    plan = _schedule(cut[0], units, blocks)
    q = queries.reshape(-1, B, Q, K, G, H).swapaxes(2, 3).reshape(-1, B, K, Q * G, H)
    q = _in_parts(q, 3, parts, M).reshape(-1, B * units, M, H)
    of_rows = _in_parts(jnp.repeat(seen, G, 2), 2, parts, M).reshape(-1, B * parts, M)
    # One view more, in which no keys lie.
    of_rows = jnp.pad(of_rows, ((0, 1), (0, 0), (0, MOST_ROWS - M)))

    launch = functools.partial(call.launch, interpret=interpret)
    warpgroup = Warpgroup(interpret is not None)
    places = (blocks + B * units) * CONSUMERS
    stage = functools.partial(plgpu.SMEM, dtype=keys.dtype, transforms=TILED)
    arrived = functools.partial(plgpu.Barrier, num_arrivals=1)
    partial, partial_lse = launch(
        functools.partial(_attend, warpgroup=warpgroup, K=K, parts=parts, pages=pages, page=page),
        layer.reshape(1),
        page_table,
        *plan[:5],
        whole,
        cut,
        of_rows,
        q,
        keys.reshape(-1, H),
        values.reshape(-1, H),
        outputs=[
            jax.ShapeDtypeStruct((places, M, H), jnp.float32),
            jax.ShapeDtypeStruct((places, MOST_ROWS), jnp.float32),
        ],
        scratch={
            "q_smem": stage((CONSUMERS, MOST_ROWS, H)),
            "k_smem": stage((stages, TILE, H)),
            "v_smem": stage((stages, TILE, H)),
            "out_smem": plgpu.SMEM(
                (CONSUMERS, MOST_ROWS, H),
                jnp.float32,
                transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
            ),
            "q_full": arrived(num_barriers=CONSUMERS),
            "k_full": arrived(num_barriers=stages),
            "v_full": arrived(num_barriers=stages),
            "k_free": arrived(num_barriers=stages),
            "v_free": arrived(num_barriers=stages),
        },
        blocks=blocks,
        warpgroups=CONSUMERS + 1,
        name="decode",
    )
    out, lse = launch(
        functools.partial(_merge, warpgroup=warpgroup, G=G, parts=parts),
        *(seen[0], plan.begin, plan.end, partial, partial_lse),
        outputs=[
            jax.ShapeDtypeStruct((B, Q, N, H), queries.dtype),
            jax.ShapeDtypeStruct((B, Q, N), jnp.float32),
        ],
        scratch={},
        blocks=B * Q * N,
        warpgroups=1,
        name="decode_merge",
    )
    return out, lse


def _in_parts(x: Array, axis: int, parts: int, M: int) -> Array:
    """Rows along an axis, filled up with zeros to parts of M."""
    return jnp.pad(x, [(0, (parts * M - x.shape[axis]) * (i == axis)) for i in range(x.ndim)])


def _schedule(lens: Int[Array, " B"], units: int, blocks: int) -> Schedule:
    """Equal runs, to a tile, of all tiles of sequences of these lengths."""
    count = -(-lens // TILE)
    upto = jnp.cumsum(count, dtype=jnp.int32)
    before = upto - count
    block = jnp.arange(blocks + 1, dtype=jnp.int32)
    each, more = jnp.divmod(upto[-1] * units, blocks)
    bounds = block * each + jnp.minimum(block, more)
    busy = count > 0
    done = busy & (upto * units <= bounds[:-1, None])

    unit = jnp.arange(units, dtype=jnp.int32)
    item = (jnp.cumsum(busy, dtype=jnp.int32)[:, None] - 1) * units + unit
    start = before[:, None] * units + unit * count[:, None]
    stop = start + count[:, None]
    # Blocks that end before a unit begins, and those that begin before it ends.
    begin = (bounds[1:] <= start[..., None]).sum(-1, dtype=jnp.int32)
    end = (bounds[:-1] < stop[..., None]).sum(-1, dtype=jnp.int32)
    end = jnp.where(busy[:, None], end, begin)
    return Schedule(
        bounds,
        done.sum(1, dtype=jnp.int32),
        jnp.argsort(~busy, stable=True).astype(jnp.int32),
        count,
        before,
        (begin + item) * CONSUMERS,
        (end + item) * CONSUMERS,
    )


def _attend(
    layer_ref,
    table_ref,
    bounds_ref,
    first_ref,
    order_ref,
    tiles_ref,
    before_ref,
    whole_ref,
    cut_ref,
    ends_ref,
    q_ref,
    keys_ref,
    values_ref,
    out_ref,
    lse_ref,
    *,
    q_smem,
    k_smem,
    v_smem,
    out_smem,
    q_full,
    k_full,
    v_full,
    k_free,
    v_free,
    warpgroup: Warpgroup,
    K: int,
    parts: int,
    pages: int,
    page: int,
):
    """The run of one block.

    Args:
        whole_ref: end of the keys that all rows of a sequence see in each view.
        cut_ref: end of the keys that any of its rows sees in each view.
        ends_ref: end of the keys that each row sees in each view but the last.
    """
    block, w = lax.axis_index(BLOCK), lax.axis_index(WARPGROUP)
    first, last = bounds_ref[block], bounds_ref[block + 1]
    stages = k_smem.shape[0]
    views, _, M, _ = q_ref.shape
    units = K * parts

    def walk(visit: Callable[..., None]) -> None:
        """Visit the tiles [begin, end) of each unit, `step` tiles after the first of the run."""

        def unit_of(state):
            at, i = state
            b = order_ref[i]
            count, before = tiles_ref[b], before_ref[b] * units
            unit = lax.div(at - before, count)
            begin = at - before - unit * count
            end = jnp.minimum(count, begin + last - at)
            visit(i, b, unit, at - first, begin, end)
            at += end - begin
            return at, jnp.where(at < before + count * units, i, i + 1)

        lax.while_loop(lambda state: state[0] < last, unit_of, (first, first_ref[block]))

    def stream(_, b, unit, step, begin, end):
        base = (layer_ref[0] * K + lax.div(unit, parts)) * pages

        @pl.loop(begin, end)
        def _tile(j):
            n = step + j - begin
            slot = lax.rem(n, stages)
            at = (base + table_ref[b, lax.div(j * TILE, page)]) * page + lax.rem(j * TILE, page)
            for cache, smem, full, free in (
                (keys_ref, k_smem, k_full, k_free),
                (values_ref, v_smem, v_full, v_free),
            ):
                pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                plgpu.copy_gmem_to_smem(cache.at[pl.ds(at, TILE)], smem.at[slot], full.at[slot])

    def attend(i, b, unit, step, begin, end):
        of_rows = b * parts + lax.rem(unit, parts)

        def own(j):
            """Steps of this warpgroup before tile j."""
            return lax.div(step + j - begin + CONSUMERS - 1 - w, CONSUMERS)

        def fetch(view):
            plgpu.copy_gmem_to_smem(
                q_ref.at[view, b * units + unit], q_smem.at[w, pl.ds(0, M)], q_full.at[w]
            )
            plgpu.barrier_wait(q_full.at[w])

        def plain(_, slot):
            return warpgroup.logits(q_smem.at[w], k_smem.at[slot])

        def masked(j, slot):
            key = j * TILE + warpgroup.iota((MOST_ROWS, TILE), 1)
            far = sum((cut_ref[view, b] > j * TILE).astype(jnp.int32) for view in range(views))
            near = sum(
                (whole_ref[view, b] >= (j + 1) * TILE).astype(jnp.int32) for view in range(1, views)
            )

            def of_view(view, s):
                fetch(view)
                stop, start = (
                    lax.broadcast_in_dim(
                        warpgroup.vector(ends_ref.at[each, of_rows], ROWS), s.shape, (0,)
                    )
                    for each in (view, view + 1)
                )
                seen = (key >= start) & (key < stop)
                return jnp.where(seen, plain(j, slot), s)

            none = warpgroup.full((MOST_ROWS, TILE), -jnp.inf)
            return lax.fori_loop(near, far, of_view, none)

        def clear(j, slot):
            """Zero the values after the last key: what lies there, times 0, may be nan."""
            left = cut_ref[0, b] - j * TILE

            @pl.when(left < TILE)
            def _clear():
                v_ref = v_smem.at[slot]
                there = warpgroup.iota((TILE, HEAD), 0) < left
                v_ref[...] = jnp.where(there, v_ref[...], jnp.zeros_like(v_ref[...]))
                plgpu.commit_smem()

        def after(logits, prepare, n, state):
            """The state after the tile of step n."""
            m, l, acc = state
            n = n * CONSUMERS + w
            j, slot = n - step + begin, lax.rem(n, stages)
            plgpu.barrier_wait(k_full.at[slot])
            s = logits(j, slot)
            plgpu.barrier_arrive(k_free.at[slot])
            m_new = jnp.maximum(m, s.max(1) * LOG2E)
            p = jnp.exp2(s * LOG2E - lax.broadcast_in_dim(m_new, s.shape, (0,)))
            decay = jnp.exp2(m - m_new)
            l = l * decay + p.sum(1)
            acc *= lax.broadcast_in_dim(decay, acc.shape, (0,))
            plgpu.barrier_wait(v_full.at[slot])
            prepare(j, slot)
            acc = warpgroup.accumulate(acc, p.astype(v_smem.dtype), v_smem.at[slot], lambda: None)
            plgpu.barrier_arrive(v_free.at[slot])
            return m_new, l, acc

        def of_view(n, state):
            view = views - 1 - n
            begun, state = state
            middle = jnp.clip(lax.div(whole_ref[view, b], TILE), begun, end)
            done = jnp.clip(pl.cdiv(cut_ref[view, b], TILE), middle, end)
            pl.when(own(begun) < own(middle))(lambda: fetch(view))
            state = lax.fori_loop(
                own(begun), own(middle), functools.partial(after, plain, lambda *_: None), state
            )
            state = lax.fori_loop(
                own(middle), own(done), functools.partial(after, masked, clear), state
            )
            return done, state

        empty = (
            warpgroup.full((MOST_ROWS,), START, ROWS),
            warpgroup.full((MOST_ROWS,), 0.0, ROWS),
            warpgroup.full((MOST_ROWS, HEAD), 0.0),
        )
        _, (m, l, acc) = lax.fori_loop(0, views, of_view, (begin, empty))

        seen = l > 0
        l = jnp.where(seen, l, 1)
        place = (block + i * units + unit) * CONSUMERS + w
        lse_ref[place] = jnp.where(seen, m + jnp.log(l) * LOG2E, -jnp.inf)
        out_smem[w] = acc / lax.broadcast_in_dim(l, acc.shape, (0,))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[w, pl.ds(0, M)], out_ref.at[place])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(w < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        walk(attend)

    @pl.when(w == CONSUMERS)
    def _produce():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        walk(stream)

        @pl.loop(jnp.maximum(last - first - stages, 0), last - first)
        def _drain(n):
            for free in (k_free, v_free):
                plgpu.barrier_wait(free.at[lax.rem(n, stages)])


def _merge(
    seen_ref,
    begin_ref,
    end_ref,
    partial_ref,
    partial_lse_ref,
    out_ref,
    lse_ref,
    *,
    warpgroup: Warpgroup,
    G: int,
    parts: int,
):
    """One query head of a token."""
    _, Q, N, H = out_ref.shape
    M = partial_ref.shape[1]
    which = lax.axis_index(BLOCK)
    b, t, n = lax.div(which, Q * N), lax.rem(lax.div(which, N), Q), lax.rem(which, N)
    row = t * G + lax.rem(n, G)
    unit, row = lax.div(n, G) * parts + lax.div(row, M), lax.rem(row, M)
    begin, end = begin_ref[b, unit], end_ref[b, unit]

    def more(step, state):
        m, l, acc = state
        first = begin + step * MERGED
        places = [jnp.minimum(first + each, end - 1) for each in range(MERGED)]
        lses = [
            jnp.where(first + each < end, partial_lse_ref[place, row], -jnp.inf)
            for each, place in enumerate(places)
        ]
        m_new = functools.reduce(jnp.maximum, lses, m)
        decay = jnp.exp2(m - m_new)
        l, acc = l * decay, acc * decay
        for lse, place in zip(lses, places, strict=True):
            weight = jnp.exp2(lse - m_new)
            l += weight
            acc += weight * partial_ref[place, row]
        return m_new, l, acc

    zero = jnp.float32(0)
    steps = pl.cdiv(end - begin, MERGED)
    m, l, acc = lax.fori_loop(
        0, steps, more, (jnp.float32(START), zero, warpgroup.full((H,), 0.0, THREADS))
    )
    busy = (seen_ref[b, t] > 0) & (l > 0)
    l = jnp.where(busy, l, 1)
    out = jnp.where(busy, acc / l, 0)
    out_ref[b, t, n] = out.astype(out_ref.dtype)
    lse_ref[b, t, n] = jnp.where(busy, (m + jnp.log(l) * LOG2E) / LOG2E, -jnp.inf)
