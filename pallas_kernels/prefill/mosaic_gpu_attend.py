"""The warpgroups of the Mosaic GPU kernel of prefill that attend.

Both go through the same steps, each for its rows of an item. They take turns: while one makes its
products, the other has its exponentials. The maximum of a row is to base 2.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import INTER, INTRA
from pallas_kernels.mosaic_gpu.call import COLUMNS as BY_COLUMN
from pallas_kernels.mosaic_gpu.call import ROWS as BY_ROW
from pallas_kernels.mosaic_gpu.call import WARPGROUP
from pallas_kernels.plan import ABSENT
from pallas_kernels.prefill.mosaic_gpu_block import (
    COLUMNS,
    ENDS,
    FIRST,
    HEAD,
    LAST,
    READERS,
    ROW,
    ROWS,
    TILE,
    Inputs,
    Scratch,
    Shape,
    for_items,
)
from pallas_kernels.softmax import MASKED

REGISTERS = 232
LOG2E, LN2 = math.log2(math.e), math.log(2)
WORD = 32  # bits


def attend(shape: Shape, inputs: Inputs, scratch: Scratch, out_ref, lse_ref) -> None:
    """Attend for this warpgroup's rows of all items."""
    plgpu.set_max_registers(REGISTERS, action="increase")
    me = jax.lax.axis_index(WARPGROUP)
    unit, width, stages = shape.unit, shape.width, jnp.int32(shape.stages)
    rows_ref, lse_rows_ref = scratch.rows.at[me], scratch.lse.at[me]
    start, shard = inputs.where[1], shape.shard.inside(inputs.where, 4)

    def turn():
        plgpu.barrier_arrive(scratch.turn)
        plgpu.barrier_wait(scratch.turn)

    def by_row(x, columns):
        return jax.lax.broadcast_in_dim(x, (ROWS, columns), [0])

    def attend_once(state, slot, seen, before_values, after_values):
        """The state after a step; see `softmax.update`.

        Args:
            seen: [ROWS, width], or None where all keys are seen.
            before_values: runs before values are read, `after_values` when they still are.
        """
        m, l, acc = state
        logits = unit.logits(rows_ref, scratch.keys.at[slot], turn)
        if seen is None:
            plgpu.barrier_arrive(scratch.keys_free.at[slot])
        else:
            logits = jnp.where(seen, logits, -jnp.inf)
        m_new = jnp.maximum(m, logits.max(axis=1) * LOG2E)
        p = jnp.exp2(logits * LOG2E - by_row(m_new, width))
        decay = jnp.exp2(m - m_new)
        l = l * decay + p.sum(axis=1)
        acc = acc * by_row(decay, shape.head_dim)
        weights = p.astype(scratch.values.dtype)
        # Else exponentials might sink below the barrier, into the other's time.
        m_new, l, acc, weights = jax.lax.optimization_barrier((m_new, l, acc, weights))
        plgpu.barrier_arrive(scratch.turn)
        before_values()
        plgpu.barrier_wait(scratch.turn)
        acc = unit.accumulate(acc, weights, scratch.values.at[slot], after_values)
        return m_new, l, acc

    def of_item(item, step):
        head, row = item(HEAD), item(ROW) + me * ROWS
        first_row, last = item(FIRST), item(LAST)
        total = item(ENDS, shape.views)
        end = step + total + (item(COLUMNS) if inputs.words is not None else 0)

        def keys_of(step):
            @pl.when(step < end)
            def _():
                plgpu.barrier_wait(scratch.keys_ready.at[jax.lax.rem(step, stages)])

        def values_of(slot):
            return lambda: plgpu.barrier_wait(scratch.values_ready.at[slot])

        def nothing():
            pass

        def load(view, held):
            """Have the queries in a view, where it is not the one at hand."""

            @pl.when(view != held)
            def _():
                rows = inputs.queries.at[view, pl.ds(row, ROWS), head]
                plgpu.copy_gmem_to_smem(rows, rows_ref, scratch.rows_ready.at[me])
                plgpu.barrier_wait(scratch.rows_ready.at[me])

            return view

        def whole(_, carry):
            """A step whose keys all rows see in one view."""
            state, step = carry
            slot = jax.lax.rem(step, stages)
            state = attend_once(state, slot, None, values_of(slot), lambda: keys_of(step + 1))
            plgpu.barrier_arrive(scratch.values_free.at[slot])
            return state, step + 1

        def region(i, carry):
            state, step, low, held = carry
            high = item(ENDS, i)
            held = load(jnp.where(high > low, shape.views - 1 - i, held), held)
            state, step = jax.lax.fori_loop(low, high, whole, (state, step))
            return state, step, high, held

        def position(row):
            t = jnp.minimum(jax.lax.div(row, jnp.int32(shape.group)), last)
            return start + t

        oldest, newest = position(first_row), position(first_row + READERS * ROWS - 1)
        mine = first_row + me * ROWS

        def view_of(q_pos, k_pos):
            return 0 if shape.geometry is None else shape.geometry.view(q_pos, k_pos)

        def cut(carry, first_pos, last_pos, k_pos):
            """A step of keys, each of which some rows may not see, once for each view it takes.

            Args:
                k_pos: [width] in the layout `COLUMNS`.
            """
            state, step, held = carry
            slot = jax.lax.rem(step, stages)
            plgpu.barrier_wait(scratch.values_ready.at[slot])
            q_pos = position(unit.iota((ROWS,), 0, BY_ROW) + mine)
            near = jnp.int32(view_of(oldest, jnp.minimum(last_pos, newest)))
            far = jnp.int32(view_of(newest, first_pos))

            def in_view(view, carry):
                state, held = carry
                held = load(view, held)
                low, high = _seen(q_pos, view, shape.geometry)
                key = jax.lax.broadcast_in_dim(k_pos, (ROWS, width), [1])
                seen = (key >= by_row(low, width)) & (key < by_row(high, width))
                return attend_once(state, slot, seen, nothing, nothing), held

            state, held = jax.lax.fori_loop(near, far + 1, in_view, (state, held))
            plgpu.barrier_arrive(scratch.keys_free.at[slot])
            plgpu.barrier_arrive(scratch.values_free.at[slot])
            keys_of(step + 1)
            return state, step + 1, held

        def cut_block(_, carry):
            first = scratch.firsts[jax.lax.rem(carry[1], stages)]
            first = shard.position(first)
            k_pos = unit.iota((width,), 0, BY_COLUMN) + first
            return cut(carry, first, first + width - 1, k_pos)

        def cut_columns(i, carry):
            tile = item(TILE)
            k_pos = unit.vector(inputs.positions.at[head, i])
            words = unit.vector(inputs.covered.at[head, jax.lax.div(tile, WORD), i])
            bit = jax.lax.rem(tile, jnp.int32(WORD))
            in_block = jax.lax.shift_right_logical(words, jnp.broadcast_to(bit, words.shape)) & 1
            k_pos = jnp.where(in_block > 0, ABSENT, k_pos)
            first, last = (inputs.positions[head, i, key] for key in (0, width - 1))
            return cut(carry, first, last, k_pos)

        keys_of(step)
        state = (
            unit.full((ROWS,), MASKED, BY_ROW),
            unit.full((ROWS,), 0.0, BY_ROW),
            unit.full((ROWS, shape.head_dim), 0.0),
        )
        carry = state, step, jnp.int32(0), jnp.int32(-1)
        state, step, low, held = jax.lax.fori_loop(0, shape.views, region, carry)
        carry = jax.lax.fori_loop(low, total, cut_block, (state, step, held))
        if inputs.words is not None:
            carry = jax.lax.fori_loop(0, item(COLUMNS), cut_columns, carry)
        (m, l, acc), step, _ = carry

        any_seen = l > 0
        safe = jnp.where(any_seen, l, 1.0)
        rows_ref[...] = (acc * by_row(1 / safe, shape.head_dim)).astype(scratch.rows.dtype)
        lse_rows_ref[...] = jnp.where(any_seen, m * LN2 + jnp.log(safe), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rows_ref, out_ref.at[pl.ds(row, ROWS), head])
        plgpu.copy_smem_to_gmem(lse_rows_ref, lse_ref.at[head, pl.ds(row, ROWS)])
        # The next queries come to the same place.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return step

    for slot in range(shape.stages):
        plgpu.barrier_arrive(scratch.keys_free.at[slot])
        plgpu.barrier_arrive(scratch.values_free.at[slot])
    # One of them is a turn behind.
    pl.when(me == 1)(turn)
    for_items(shape, inputs.items, of_item)
    pl.when(me == 0)(turn)


def _seen(q_pos, view, geometry):
    """Positions of the keys that queries see in a view: the first, and one past the last."""
    if geometry is None:
        return 0 * q_pos, q_pos + 1  # in one layout
    chunk = geometry.chunk_len
    first = (jax.lax.div(q_pos, jnp.int32(chunk)) - view) * chunk
    high = jnp.where(view == INTRA, q_pos + 1, first + chunk)
    return jnp.where(view == INTER, 0, first), high
