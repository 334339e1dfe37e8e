"""The warpgroup of the Mosaic GPU kernel of prefill that fetches keys and values."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.prefill.mosaic_gpu_block import (
    COLUMNS,
    ENDS,
    HEAD,
    TILE,
    Inputs,
    Scratch,
    Shape,
    for_items,
)

REGISTERS = 40
WORD = 32  # bits


def fetch(shape: Shape, inputs: Inputs, scratch: Scratch) -> None:
    """Fill slots with the steps of all items, and wait until all are free again."""
    plgpu.set_max_registers(REGISTERS, action="decrease")
    layer, tail = inputs.where[0], inputs.where[3]
    width, page = shape.width, shape.page

    def put(step, first, sources):
        """Fill the slot of a step from the source whose condition holds."""
        slot = jax.lax.rem(step, jnp.int32(shape.stages))
        for part, into, ready, free in (
            (0, scratch.keys, scratch.keys_ready, scratch.keys_free),
            (1, scratch.values, scratch.values_ready, scratch.values_free),
        ):
            plgpu.barrier_wait(free.at[slot])
            if part == 0:
                # Readers see it, for `ready` orders it before them.
                scratch.firsts[slot] = first
            for holds, refs, row in sources:

                @pl.when(holds)
                def _(source=refs[part], row=row, into=into, ready=ready):
                    rows = source.at[pl.ds(row, width)]
                    plgpu.copy_gmem_to_smem(rows, into.at[slot], ready.at[slot])

        return step + 1

    def of_item(item, step):
        head = item(HEAD)
        kv_head = jax.lax.div(head, jnp.int32(shape.heads_per_kv))
        first_page = (layer * shape.kv_heads + kv_head) * shape.pages
        cache = inputs.keys, inputs.values
        tails = inputs.tail_keys, inputs.tail_values

        def block(step, number):
            """Fetch keys from `number` steps on, which lie in one page.

            Of a block that the end cuts, steps after it get the zeros of the step that it cuts.
            """
            first = number * width
            where = jax.lax.div(first, jnp.int32(page))
            row = (first_page + inputs.table[where]) * page + jax.lax.rem(first, jnp.int32(page))
            cut = number >= tail
            return put(
                step,
                first,
                [(jnp.logical_not(cut), cache, row), (cut, tails, kv_head * width)],
            )

        total = item(ENDS, shape.views)
        if inputs.words is None:
            return jax.lax.fori_loop(0, total, lambda i, step: block(step, i), step)

        words, tile = inputs.words, item(TILE)
        pieces = shape.block // width

        def listed(_, state):
            step, word, bits = jax.lax.while_loop(
                lambda state: state[2] == 0,
                lambda state: (state[0], state[1] + 1, words[head, tile, state[1] + 1]),
                state,
            )
            lowest = bits & -bits
            number = word * WORD + WORD - 1 - jax.lax.clz(lowest)
            for piece in range(pieces):
                step = block(step, number * pieces + piece)
            return step, word, bits ^ lowest

        start = step, jnp.int32(-1), jnp.int32(0)
        blocks = jax.lax.div(total, jnp.int32(pieces))
        step, _, _ = jax.lax.fori_loop(0, blocks, listed, start)

        columns = inputs.column_keys, inputs.column_values
        first_row = head * inputs.positions.shape[1] * width

        def column(i, step):
            return put(step, i, [(i >= 0, columns, first_row + i * width)])

        return jax.lax.fori_loop(0, item(COLUMNS), column, step)

    for_items(shape, inputs.items, of_item)
    for slot in range(shape.stages):
        plgpu.barrier_wait(scratch.keys_free.at[slot])
        plgpu.barrier_wait(scratch.values_free.at[slot])
