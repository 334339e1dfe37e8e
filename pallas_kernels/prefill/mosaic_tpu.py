"""Prefill for TPU: one kernel, dense or by a plan, over the paged cache where it lies.

A grid step attends for one tile of queries. It walks over steps of keys; a step is made of
pieces that each lie in one page, copied to VMEM while the step before is computed. Without
a plan the pieces follow one another and the heads of a kv head join the rows of a tile; with
one a tile has one head, its pieces are the blocks of the plan, and the single columns come
last, packed. A step that no mask and no border of chunks cuts has one view of the queries
and goes through `_attend_whole`, which only attends; the others go through `_attend_cut`.

The logits are to base 2: the queries come in times log2(e).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import plan as plans
from pallas_kernels.backend import Unsupported
from pallas_kernels.geometry import INTER, INTRA, SUCC, ChunkGeometry
from pallas_kernels.plan import SparsePlan
from pallas_kernels.softmax import MASKED
from pallas_kernels.tiles import Tiles

TILES = Tiles(q=1792, k=1024)
STEP = 1024  # listed keys a step
LANES = 128  # of a vector register
WORD = 32  # bits
ORDER = 0
MAXR = 1024
SUB = 512
FAR = 2**30  # further than any position
VMEM_BYTES = 32 * 2**20


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
    tiles: Tiles = TILES,
    step: int = STEP,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """See `api.prefill`.

    Args:
        tiles: of an attention without a plan, which brings its own; rounded to whole
            registers.
        step: keys a step of one with a plan.

    Raises:
        Unsupported: if a step of keys is not whole registers, if blocks of the plan do not
            divide the page, or, on a TPU, if a piece is smaller than its registers.
    """
    views, T, N, H = queries.shape
    _, K, _, page, _ = keys.shape
    if plan is None:
        G, width = N // K, tiles.k
        q = min(max(tiles.q // G // LANES, 1), pl.cdiv(T, LANES)) * LANES
        piece, rows_of_head = math.gcd(page, width), q
    else:
        G, width, q, piece = 1, step, plan.tiles.q, plan.tiles.k
        rows_of_head = pl.cdiv(q, LANES) * LANES
    if width % LANES or width % piece or page % piece:
        raise Unsupported(f"a step of {width} keys in pieces of {piece} and pages of {page}")
    least = 32 // keys.dtype.itemsize
    if not interpret and piece % least:
        raise Unsupported(f"pieces of {piece} keys; a TPU copies whole tiles of {least}")
    heads, count = N // G, pl.cdiv(T, q)
    shape = _Shape(
        q=q,
        rows_of_head=rows_of_head,
        group=G,
        width=width,
        piece=piece,
        page=page,
        kv_heads=K,
        kv_group=heads // K,
        geometry=geometry,
    )
    M = shape.rows

    scaled = (queries.astype(jnp.float32) * math.log2(math.e)).astype(queries.dtype)
    rows = jnp.pad(scaled, ((0, 0), (0, count * q - T), (0, 0), (0, 0)))
    rows = rows.reshape(views, count, q, heads, G, H).transpose(0, 3, 1, 4, 2, 5)
    rows = jnp.pad(rows, ((0, 0),) * 4 + ((0, rows_of_head - q), (0, 0)))
    rows = rows.reshape(views, heads, count, M, H)

    where = jnp.stack([layer, start, length])
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    in_specs = [
        pl.BlockSpec((views, None, None, M, H), lambda n, i, *_: (0, n, i, 0, 0)),
        anywhere,
        anywhere,
    ]
    # A view: rows of pages lie one after another.
    args = [rows, *(cache.reshape(-1, cache.shape[2] * page, H) for cache in (keys, values))]
    scratch = [
        pltpu.VMEM((2, width, H), keys.dtype),
        pltpu.VMEM((2, width, H), values.dtype),
        pltpu.VMEM((M, LANES), jnp.float32),  # m: running maximum, in every lane
        pltpu.VMEM((M, LANES), jnp.float32),  # l: running sum, a part in each lane
        pltpu.VMEM((M, H), jnp.float32),  # acc: unnormalised output
        pltpu.VMEM((2, shape.chunk, shape.sub), jnp.float32),  # logits
        # Their exponentials, in words: whole registers are written.
        pltpu.VMEM((2, shape.chunk * values.dtype.itemsize // 4, shape.sub), jnp.uint32),
        pltpu.VMEM((2, shape.chunk, LANES), jnp.float32),  # decay of the output
        pltpu.VMEM((width // shape.sub, 1, shape.sub), jnp.int32),  # positions of keys
        pltpu.SemaphoreType.DMA((2,)),
    ]
    if plan is not None:
        listed = _listed(plan, keys, values, layer, page_table, start + length, width)
        args += listed
        columns, covered = listed[2], listed[3]
        in_specs += [
            anywhere,
            anywhere,
            pl.BlockSpec((None, *columns.shape[1:]), lambda n, i, *_: (n, 0, 0, 0)),
            pl.BlockSpec(
                (None, None, *covered.shape[2:]), lambda n, i, *_: (n, i // WORD, 0, 0, 0)
            ),
            _in_smem(listed[4], lambda n, i, *_: (n, 0, 0)),
            _in_smem(listed[5], lambda n, i, *_: (n, i, 0, 0)),
        ]
        # Numbers of the blocks that a tile reads, and their rows in the cache.
        scratch += 2 * [pltpu.SMEM(((plan.blocks.shape[2] + 1) * WORD,), jnp.int32)]
    out, lse = pl.pallas_call(
        functools.partial(_dense if plan is None else _sparse, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(heads, count),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((None, None, M, H), lambda n, i, *_: (n, i, 0, 0)),
                pl.BlockSpec((None, None, M // LANES, LANES), lambda n, i, *_: (n, i, 0, 0)),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((heads, count, M, H), queries.dtype),
            jax.ShapeDtypeStruct((heads, count, M // LANES, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="prefill_dense" if plan is None else "prefill_sparse",
    )(where, page_table, *args)
    out = out.reshape(heads, count, G, rows_of_head, H)[:, :, :, :q]
    lse = lse.reshape(heads, count, G, rows_of_head)[:, :, :, :q]
    out = out.transpose(1, 3, 0, 2, 4).reshape(count * q, N, H)
    lse = lse.transpose(1, 3, 0, 2).reshape(count * q, N)
    return out[:T], lse[:T]


def _in_smem(array, index_map):
    block = tuple(None if d < array.ndim - 2 else s for d, s in enumerate(array.shape))
    return pl.BlockSpec(block, index_map, memory_space=pltpu.SMEM)


def _listed(plan: SparsePlan, keys, values, layer, page_table, kv_len, width):
    """What the kernel reads of a plan: packed columns, where they lie, and the bits of blocks.

    Returns:
        keys and values of the columns [N, columns, H], zero where there is none; their
        positions [N, steps, 1, width]; bits [N, words, steps, 1, width], of which bit b of
        word w says that tile 32 w + b reads the column's block; first and last position
        of each step [N, 1, 2 steps]; the bits of blocks [N, tiles, 1, words].
    """
    N, num_tiles, words = plan.blocks.shape
    V, page = plan.columns.shape[1], keys.shape[3]
    steps = max(pl.cdiv(V, width), 1)
    columns = jnp.pad(plan.columns, ((0, 0), (0, steps * width - V)), constant_values=plans.ABSENT)
    at = jnp.minimum(columns, jnp.maximum(kv_len - 1, 0))
    head = jnp.arange(N, dtype=jnp.int32)[:, None] // (N // keys.shape[1])
    there = (columns < kv_len)[..., None]
    index = layer, head, page_table[at // page], at % page
    packed = [jnp.where(there, cache[index], 0) for cache in (keys, values)]

    def bits_of(head):
        blocks, columns = head
        block = jnp.minimum(columns // plan.tiles.k, words * WORD - 1)
        reads = blocks[:, block // WORD] >> (block % WORD).astype(jnp.uint32) & 1
        reads = jnp.pad(reads, ((0, -num_tiles % WORD), (0, 0)))
        reads = reads.reshape(-1, WORD, reads.shape[1])
        return (reads << jnp.arange(WORD, dtype=jnp.uint32)[:, None]).sum(1, dtype=jnp.uint32)

    covered = jax.lax.bitcast_convert_type(jax.lax.map(bits_of, (plan.blocks, columns)), jnp.int32)
    columns = columns.reshape(N, steps, 1, width)
    spans = jnp.stack([columns[:, :, 0, 0], columns[:, :, 0, -1]], -1)
    return [
        *packed,
        columns,
        covered.reshape(N, -1, steps, 1, width),
        spans.reshape(N, 1, 2 * steps),
        jax.lax.bitcast_convert_type(plan.blocks, jnp.int32)[:, :, None],
    ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Sizes of a grid step.

    Attributes:
        q: positions a tile.
        rows_of_head: rows of one query head, at least q.
        group: query heads that join the rows of a tile.
        width: keys a step.
        piece: keys that are copied together.
        kv_heads: kv heads of a layer.
        kv_group: heads of the grid that read one kv head.
    """

    q: int
    rows_of_head: int
    group: int
    width: int
    piece: int
    page: int
    kv_heads: int
    kv_group: int
    geometry: ChunkGeometry | None

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.group * self.rows_of_head

    @property
    def chunk(self) -> int:
        """Rows that go through the matrix unit together."""
        return max(c for c in range(LANES, MAXR + 1, LANES) if self.rows % c == 0)

    @property
    def sub(self) -> int:
        """Keys that go through the softmax together."""
        return max(c for c in range(LANES, SUB + 1, LANES) if self.width % c == 0)

    @property
    def pieces(self) -> int:
        """Pieces a step."""
        return self.width // self.piece

    def view(self, q_pos, k_pos):
        """The view of a pair of positions, both scalars."""
        if self.geometry is None:
            return jnp.int32(0)
        length = self.geometry.chunk_len
        apart = jax.lax.div(q_pos, jnp.int32(length)) - jax.lax.div(k_pos, jnp.int32(length))
        return jnp.clip(apart, INTRA, INTER)


class _Tile:
    """One tile of queries inside the kernel: its refs, its positions, its softmax."""

    def __init__(self, shape, where_ref, q_ref, out_ref, lse_ref, scratch):
        self.shape = shape
        self.q_ref, self.out_ref, self.lse_ref = q_ref, out_ref, lse_ref
        (
            self.key_ref,
            self.value_ref,
            self.m_ref,
            self.l_ref,
            self.acc_ref,
            self.s_ref,
            self.p_ref,
            self.decay_ref,
            self.positions_ref,
            self.semaphores,
        ) = scratch
        self.first_row = pl.program_id(1) * shape.q
        self.length = where_ref[2]
        self.first = where_ref[1] + self.first_row
        self.last = where_ref[1] + jnp.minimum(self.first_row + shape.q, self.length) - 1
        exact = jnp.float32 == self.key_ref.dtype
        self.dot = functools.partial(
            jax.lax.dot_general,
            precision=jax.lax.Precision.HIGHEST if exact else None,
            preferred_element_type=jnp.float32,
        )

    def start(self):
        def body(i, _):
            rows = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
            self.m_ref[rows] = jnp.full((LANES, LANES), MASKED, jnp.float32)
            self.l_ref[rows] = jnp.zeros((LANES, LANES), jnp.float32)
            self.acc_ref[rows] = jnp.zeros((LANES, self.acc_ref.shape[1]), jnp.float32)
            return 0

        jax.lax.fori_loop(0, self.shape.rows // LANES, body, 0)

    def finish(self):
        def body(i, _):
            rows = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
            m, l = self.m_ref[rows], self.l_ref[rows].sum(1, keepdims=True)
            seen = m > MASKED
            l = jnp.where(seen, jnp.broadcast_to(l, m.shape), 1.0)
            acc = self.acc_ref[rows]
            out = jnp.where(_wide(seen, acc), acc / _wide(l, acc), 0.0)
            self.out_ref[rows] = out.astype(self.out_ref.dtype)
            lse = jnp.where(seen, (m + jnp.log2(l)) * math.log(2), -jnp.inf)
            self.lse_ref[pl.ds(i, 1)] = lse.T[:1]
            return 0

        jax.lax.fori_loop(0, self.shape.rows // LANES, body, 0)

    def views(self, first, last):
        """The nearest and the farthest view of the tile for keys from `first` to `last`."""
        last = jnp.minimum(last, self.last)
        return self.shape.view(self.first, last), self.shape.view(self.last, first)

    def wait(self, slot):
        """Until both parts of a step have arrived."""
        for ref in (self.key_ref, self.value_ref):
            pltpu.make_async_copy(ref.at[slot], ref.at[slot], self.semaphores.at[slot]).wait()

    def logits(self, view, rows, slot, keys):
        contract_last = (((1,), (1,)), ((), ()))
        return self.dot(self.q_ref[view, rows], self.key_ref[slot, keys], contract_last)

    def weigh(self, rows, logits, p_ref, decay_ref, *, bias=None):
        """Exponentials of some rows' logits, and by what these rows' output decays."""
        parts = [pl.ds(i, LANES) for i in range(0, logits.shape[1], LANES)]
        m_old, m = self.m_ref[rows], logits[:, parts[0]]
        for keys in parts[1:]:
            m = jnp.maximum(m, logits[:, keys])
        m = jnp.maximum(m_old, m.max(1, keepdims=True))
        decay = jnp.exp2(m_old - m)
        l = decay * self.l_ref[rows]
        for keys in parts:
            s = logits[:, keys] - m
            p = jnp.exp2(s if bias is None else s + bias[:, keys.start : keys.start + LANES])
            l = l + p
            p_ref[:, keys] = pltpu.bitcast(p.astype(self.value_ref.dtype), p_ref.dtype)
        self.m_ref[rows], self.l_ref[rows], decay_ref[...] = m, l, decay

    def add(self, rows, p_ref, decay_ref, value):
        """The output of some rows after more values."""
        p = pltpu.bitcast(p_ref[...], value.dtype)
        added = self.dot(p, value, (((1,), (0,)), ((), ())))
        self.acc_ref[rows] = _wide(decay_ref[...], added) * self.acc_ref[rows] + added

    def attend_whole(self, slot, view, ahead, *, bias=None):
        """Attend to a step that all rows see in one view.

        The logits of a part are written before the softmax of the part before it, so that
        the matrix units work while the exponentials are taken.
        """
        shape = self.shape
        parts = [
            (pl.ds(row, shape.chunk), pl.ds(key, shape.sub))
            for row in range(0, shape.rows, shape.chunk)
            for key in range(0, shape.width, shape.sub)
        ]

        def dot(i):
            rows, keys = parts[i]
            self.s_ref[i % 2] = self.logits(view, rows, slot, keys)

        def weigh(i, ahead):
            rows, keys = parts[i]
            here = None if bias is None else bias[:, keys.start : keys.start + shape.sub]
            for row in range(0, shape.chunk, LANES):
                some = pl.ds(row, LANES)
                words = LANES * self.value_ref.dtype.itemsize // 4
                self.weigh(
                    pl.ds(rows.start + row, LANES),
                    self.s_ref.at[i % 2, some],
                    self.p_ref.at[i % 2, pl.ds(row // LANES * words, words)],
                    self.decay_ref.at[i % 2, some],
                    bias=here,
                )
                if ahead:
                    ahead.pop(0)()

        def add(i):
            rows, keys = parts[i]
            refs = (ref.at[i % 2] for ref in (self.p_ref, self.decay_ref))
            self.add(rows, *refs, self.value_ref[slot, keys])

        dot(0)
        for i in range(len(parts)):
            if i + 1 < len(parts):
                dot(i + 1)
            weigh(i, ahead)
            add(i)
        for fetch in ahead:
            fetch()

    def attend_cut(self, slot, near, far, part_first):
        """Attend to a step of which each row sees some keys, in views `near` to `far`.

        Positions of the keys are in `positions_ref`; those of keys that must not show lie
        past `last`.

        Args:
            part_first: the lowest position from a key of the step on.
        """
        shape = self.shape
        height = math.gcd(2 * LANES, shape.rows)
        chunks, subs = shape.rows // height, shape.width // shape.sub
        logits = self.s_ref.at[0, :height]
        p = self.p_ref.at[0, : height * self.value_ref.dtype.itemsize // 4]
        decay = self.decay_ref.at[0, :height]

        def part(number, i):
            view = near + jax.lax.div(number, jnp.int32(chunks))
            row = pl.multiple_of(jax.lax.rem(number, jnp.int32(chunks)) * height, height)
            rows = pl.ds(row, height)
            keys = pl.ds(pl.multiple_of(i * shape.sub, shape.sub), shape.sub)
            low, high = self.seen(row, height, view)
            k_pos = self.positions_ref[i]
            seen = (k_pos >= low) & (k_pos <= high)
            logits[...] = jnp.where(seen, self.logits(view, rows, slot, keys), MASKED)
            self.weigh(rows, logits, p, decay)
            self.add(rows, p, decay, self.value_ref[slot, keys])
            return i

        def sub(i, _):
            @pl.when(part_first(i * shape.sub) <= self.last)
            def _():
                jax.lax.fori_loop(0, (far - near + 1) * chunks, part, i)

            return 0

        jax.lax.fori_loop(0, subs, sub, 0)

    def seen(self, row, height, view):
        """The first and the last position that each of some rows sees in a view, [height, 1]."""
        shape, geometry = self.shape, self.shape.geometry
        row = row + jax.lax.broadcasted_iota(jnp.int32, (height, 1), 0)
        row = row - _floor_div(row, shape.rows_of_head) * shape.rows_of_head
        # Padding repeats the last position, lest it reach into the next chunk.
        q_pos = jnp.minimum(self.first + row, self.last)
        if geometry is None:
            return jnp.zeros_like(q_pos), q_pos
        length = jnp.int32(geometry.chunk_len)
        base = jax.lax.div(self.first, length) * length
        own = base + _floor_div(q_pos - base, geometry.chunk_len) * length
        below = jnp.where(view == INTRA, 0, jnp.where(view == SUCC, length, FAR))
        above = jnp.where(view == INTRA, FAR, jnp.where(view == SUCC, 0, -length))
        return own - below, jnp.minimum(q_pos, own + above - 1)

    def clear(self, slot, position_of):
        """Make values past `last` zero: 0 x nan of a stale row is nan."""
        height = math.gcd(LANES, self.shape.piece)

        def body(i, _):
            row = i * height
            rows = pl.ds(pl.multiple_of(row, height), height)
            value = self.value_ref[slot, rows]
            position = position_of(row) + jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
            kept = jnp.where(position <= self.last, value.astype(jnp.float32), 0.0)
            self.value_ref[slot, rows] = kept.astype(value.dtype)
            return 0

        jax.lax.fori_loop(0, self.shape.width // height, body, 0)


def _wide(x, like):
    """Lanes of x, all equal, as many as `like` has."""
    return x[:, : like.shape[1]] if like.shape[1] <= LANES else jnp.tile(x, like.shape[1] // LANES)


def _floor_div(x, n: int):
    """x // n of int32 in [0, 2^22): a vector unit has no integer division."""
    return jnp.floor((x.astype(jnp.float32) + 0.5) / n).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """The packed columns of a head inside the kernel; see `_listed`.

    Attributes:
        number: steps of columns that the tile reads some of.
    """

    keys_ref: Any
    values_ref: Any
    positions_ref: Any
    covered_ref: Any
    spans_ref: Any
    number: Int[Array, ""]

    def in_block(self, j):
        """Which columns of step j lie in a block that the tile reads, [1, width]."""
        bit = jax.lax.rem(pl.program_id(1), WORD)
        return jax.lax.shift_right_logical(self.covered_ref[j], bit) & 1 > 0


def _sweep(tile, layer, keys_ref, values_ref, row_at, piece_at, number, columns=None):
    """Attend to `number` steps of pieces, then to columns.

    Args:
        row_at: where piece b of step j begins in the cache of a head; of any other piece if
            it does not count.
        piece_at: position of piece b of step j, and whether it counts.
    """
    shape = tile.shape
    head = jax.lax.div(pl.program_id(0), jnp.int32(shape.kv_group))
    lane_of_cache = layer * shape.kv_heads + head
    total = number if columns is None else number + columns.number

    def copy(source, into, buffer, slot):
        pltpu.make_async_copy(source, buffer.at[slot, into], tile.semaphores.at[slot]).start()

    def fetch_piece(row, b, slot):
        rows = pl.ds(pl.multiple_of(row, shape.piece), shape.piece)
        into = pl.ds(pl.multiple_of(b * shape.piece, shape.piece), shape.piece)
        copy(keys_ref.at[lane_of_cache, rows], into, tile.key_ref, slot)
        copy(values_ref.at[lane_of_cache, rows], into, tile.value_ref, slot)

    def fetch(j, slot):
        def piece(b, _):
            fetch_piece(row_at(j, b), b, slot)
            return 0

        @pl.when(j < number)
        def _():
            jax.lax.fori_loop(0, shape.pieces, piece, 0)

        if columns is None:
            return

        @pl.when((j >= number) & (j < total))
        def _():
            row = pl.multiple_of((j - number) * shape.width, shape.width)
            rows, into = pl.ds(row, shape.width), pl.ds(0, shape.width)
            copy(columns.keys_ref.at[pl.program_id(0), rows], into, tile.key_ref, slot)
            copy(columns.values_ref.at[pl.program_id(0), rows], into, tile.value_ref, slot)

    def position_of(j, key):
        first, counts = piece_at(j, jax.lax.div(jnp.int32(key), jnp.int32(shape.piece)))
        return jnp.where(counts, first + jax.lax.rem(key, jnp.int32(shape.piece)), FAR)

    def write_positions(j):
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, shape.sub), 1)
        for i in range(shape.width // shape.sub):
            begin = i * shape.sub
            positions = lane + position_of(j, begin)
            for key in range(shape.piece, shape.sub, shape.piece):
                positions = jnp.where(
                    lane >= key, lane - key + position_of(j, begin + key), positions
                )
            tile.positions_ref[i] = positions

    def step(j, _):
        slot = jax.lax.rem(j, 2)
        tile.wait(slot)
        listed = j < number
        column = jnp.maximum(j - number, 0)
        first, last = position_of(j, 0), position_of(j, shape.width - 1)
        if columns is not None:
            spans = columns.spans_ref
            first = jnp.where(listed, first, spans[0, 2 * column])
            last = jnp.where(listed, last, spans[0, 2 * column + 1])
        near, far = tile.views(first, last)
        whole = (last <= tile.first) & (near == far)
        # Copies of the next step start in the block of code that they shall overlap with,
        # so there must be one.
        plain = whole & (j + 1 < number)

        @pl.when(plain)
        def _():
            ahead = [
                functools.partial(fetch_piece, row_at(j + 1, b), b, 1 - slot)
                for b in range(shape.pieces)
            ]
            tile.attend_whole(slot, near, ahead)

        @pl.when(jnp.logical_not(plain))
        def _():
            fetch(j + 1, 1 - slot)

        cut = jnp.logical_not(plain)
        if columns is not None:
            cut &= listed | jnp.logical_not(whole)

            @pl.when(whole & jnp.logical_not(listed))
            def _():
                in_block = columns.in_block(column)
                tile.attend_whole(slot, near, [], bias=jnp.where(in_block, MASKED, 0.0))

            @pl.when(cut & jnp.logical_not(listed))
            def _():
                in_block, position = columns.in_block(column), columns.positions_ref[column]
                position = jnp.where(in_block, FAR, position)
                for i in range(shape.width // shape.sub):
                    tile.positions_ref[i] = position[:, i * shape.sub : (i + 1) * shape.sub]

        @pl.when(cut & listed)
        def _():
            tile.clear(slot, functools.partial(position_of, j))
            write_positions(j)

        def part_first(key):
            return jnp.where(listed, position_of(j, key), first)

        @pl.when(cut)
        def _():
            tile.attend_cut(slot, near, far, part_first)

        return 0

    fetch(0, 0)
    jax.lax.fori_loop(0, total, step, 0)


def _dense(shape, where_ref, table_ref, q_ref, keys_ref, values_ref, out_ref, lse_ref, *scratch):
    """A tile of queries over all keys."""
    tile = _Tile(shape, where_ref, q_ref, out_ref, lse_ref, scratch)
    tile.start()

    def piece_at(j, b):
        first = j * shape.width + b * shape.piece
        final = jax.lax.div(tile.last, jnp.int32(shape.piece)) * shape.piece
        return jnp.minimum(first, final), first <= final

    def row_at(j, b):
        first, _ = piece_at(j, b)
        page = table_ref[jax.lax.div(first, jnp.int32(shape.page))]
        return page * shape.page + jax.lax.rem(first, jnp.int32(shape.page))

    number = jnp.where(tile.first_row < tile.length, pl.cdiv(tile.last + 1, shape.width), 0)
    _sweep(tile, where_ref[0], keys_ref, values_ref, row_at, piece_at, number)
    tile.finish()


def _sparse(
    shape,
    where_ref,
    table_ref,
    q_ref,
    keys_ref,
    values_ref,
    packed_keys_ref,
    packed_values_ref,
    positions_ref,
    covered_ref,
    spans_ref,
    words_ref,
    out_ref,
    lse_ref,
    *scratch,
):
    """A tile of queries of one head over the blocks that a plan lists, then over its columns."""
    *scratch, block_ref, row_ref = scratch
    tile = _Tile(shape, where_ref, q_ref, out_ref, lse_ref, scratch)
    tile.start()
    wanted = tile.first_row < tile.length
    span = min(shape.page // shape.piece, WORD)  # bits that lie in one page
    last_page = jax.lax.div(tile.last, jnp.int32(shape.page))

    def append(word, count):
        bits = words_ref[0, word]

        def some():
            end = count
            for bit in range(WORD):
                first = (WORD * word + bit // span * span) * shape.piece
                page = jnp.minimum(jax.lax.div(first, jnp.int32(shape.page)), last_page)
                base = table_ref[page] * shape.page + jax.lax.rem(first, jnp.int32(shape.page))
                block_ref[end] = WORD * word + bit
                row_ref[end] = base + bit % span * shape.piece
                end += jax.lax.shift_right_logical(bits, jnp.int32(bit)) & 1
            return end

        return jax.lax.cond(bits != 0, some, lambda: count)

    words = jnp.where(wanted, pl.cdiv(tile.last + 1, WORD * shape.piece), 0)
    count = jax.lax.fori_loop(0, words, append, jnp.int32(0))

    def rank_of(j, b):
        return jnp.clip(j * shape.pieces + b, 0, count - 1)

    def piece_at(j, b):
        return block_ref[rank_of(j, b)] * shape.piece, j * shape.pieces + b < count

    def row_at(j, b):
        return row_ref[rank_of(j, b)]

    def later(j, number):
        return number + (spans_ref[0, 2 * j] <= tile.last).astype(jnp.int32)

    steps = jax.lax.fori_loop(0, spans_ref.shape[1] // 2, later, jnp.int32(0))
    columns = _Columns(
        keys_ref=packed_keys_ref,
        values_ref=packed_values_ref,
        positions_ref=positions_ref,
        covered_ref=covered_ref,
        spans_ref=spans_ref,
        number=jnp.where(wanted, steps, 0),
    )
    number = pl.cdiv(count, shape.pieces)
    _sweep(tile, where_ref[0], keys_ref, values_ref, row_at, piece_at, number, columns)
    tile.finish()
