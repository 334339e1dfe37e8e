"""Flash attention of one tile of queries inside the TPU kernel of prefill.

Logits are to base 2, of queries times log2(e). A step of keys that no mask and no
border of chunks cuts has one view of the queries and goes through `attend_whole`, which only
attends; the others go through `attend_cut`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.geometry import INTER, INTRA, SUCC, ChunkGeometry
from pallas_kernels.shard import Shard
from pallas_kernels.softmax import MASKED

LANES = 128  # of a vector register
FAR = 2**30  # further than any position
CHUNK = 896  # most rows that go through a matrix unit together
SUB = 512  # most keys that go through the softmax together


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
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
    shard: Shard

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.group * self.rows_of_head

    @property
    def chunk(self) -> int:
        """Rows that go through the matrix unit together."""
        return max(c for c in range(LANES, CHUNK + 1, LANES) if self.rows % c == 0)

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


class Tile:
    """One tile of queries inside the kernel: its refs, its positions, its softmax."""

    def __init__(self, shape, where_ref, q_ref, out_ref, lse_ref, scratch):
        self.shape = shape
        self.q_ref, self.out_ref, self.lse_ref = q_ref, out_ref, lse_ref
        (
            self.rows_ref,
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
        self.shard = shape.shard.inside(where_ref, 3)
        self.last_key = self.shard.upto(self.last)  # local, -1 if there is none
        exact = jnp.float32 == self.key_ref.dtype
        self.dot = functools.partial(
            jax.lax.dot_general,
            precision=jax.lax.Precision.HIGHEST if exact else None,
            preferred_element_type=jnp.float32,
        )

    def place(self, i):
        """Head and positions of the i-th LANES rows, as in the queries and the output."""
        parts = jnp.int32(self.shape.rows_of_head // LANES)
        first = pl.multiple_of(jax.lax.rem(i, parts) * LANES, LANES)
        return jax.lax.div(i, parts), pl.ds(first, LANES)

    def start(self):
        def body(i, _):
            rows = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
            self.m_ref[rows] = jnp.full((LANES, LANES), MASKED, jnp.float32)
            self.l_ref[rows] = jnp.zeros((LANES, LANES), jnp.float32)
            self.acc_ref[rows] = jnp.zeros((LANES, self.acc_ref.shape[1]), jnp.float32)
            query = self.q_ref[:, *self.place(i)].astype(jnp.float32)
            scaled = query * math.log2(math.e)
            self.rows_ref[:, rows] = scaled.astype(self.rows_ref.dtype)
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
            self.out_ref[self.place(i)] = out.astype(self.out_ref.dtype)
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
        return self.dot(self.rows_ref[view, rows], self.key_ref[slot, keys], contract_last)

    def weigh(self, rows, logits, p_ref, decay_ref, *, bias=None):
        """Exponentials of some rows' logits, and by what these rows' output decays.

        A bias may not hide the largest logit of a row from its maximum: what it masks, the
        row has read or will read elsewhere.
        """
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

    def attend_whole(self, slot, view, *, ahead=lambda: None, bias=None):
        """Attend to a step that all rows see in one view.

        The logits of a part are written before the softmax of the part before it, so that
        the matrix units work while the exponentials are taken.

        Args:
            ahead: starts the copies of the step after; where it is called, work that does
                not touch the buffers hides most of it.
            bias: added to the logits of each key [1, width].
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

        def weigh(i):
            rows, keys = parts[i]
            here = None if bias is None else bias[:, keys.start : keys.start + shape.sub]
            logits, p, decay = (ref.at[i % 2] for ref in (self.s_ref, self.p_ref, self.decay_ref))
            self.weigh(rows, logits, p, decay, bias=here)

        def add(i):
            rows, keys = parts[i]
            value = self.value_ref[slot, keys]
            self.add(rows, self.p_ref.at[i % 2], self.decay_ref.at[i % 2], value)

        dot(0)
        for i in range(len(parts)):
            if i + 1 < len(parts):
                dot(i + 1)
            if i == 0:
                ahead()
            weigh(i)
            add(i)

    def attend_cut(self, slot, near, far, part_first):
        """Attend to a step of which each row sees some keys, in views `near` to `far`.

        Positions of the keys are in `positions_ref`; those of keys that must not show lie
        past `last`.

        Args:
            part_first: the lowest position from a key of the step on.
        """
        shape = self.shape
        height = LANES
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
    """Quotients x // n of int32 in [0, 2^22): a vector unit has no integer division."""
    return jnp.floor((x.astype(jnp.float32) + 0.5) / n).astype(jnp.int32)
