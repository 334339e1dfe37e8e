"""State that warpgroups share in the Mosaic GPU kernel of prefill: shapes, items, slots.

An item is a tile of rows of one head, and blocks take items in turn, the longest first. Keys and
values pass through slots of shared memory; step i of a block, whatever the item, is in slot
`i % stages`, from when its barrier says that it is ready to when both readers have set it free.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.mosaic_gpu.call import BLOCK, TILED, Warpgroup
from pallas_kernels.shard import Shard

READERS = 2
"""Number of warpgroups that attend; one more fetches."""
ROWS = 64
"""Rows per reader: those of a warpgroup's matrix product."""
HEAD, ROW, FIRST, LAST, TILE, COLUMNS, ENDS = range(7)
"""Columns of the table of items: the head; its first row in memory; the row that this is without
the padding of tiles, and the last position in the slice, for none follows later; the tile of the
plan; steps of columns; then, for each view of Dual Chunk Attention, the oldest keys first, the step
where those end that all rows see in it, and where all steps of blocks end."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Static sizes.

    Attributes:
        items: number of items of all blocks together.
        group: rows of one position: heads that share an item.
        heads_per_kv: heads of items that read one KV head.
        pages: pages of the cache, of `page` keys each.
        width: keys per step.
        block: keys per block of the plan; `width` without a plan.
        stages: number of slots.
    """

    blocks: int
    items: int
    views: int
    group: int
    heads_per_kv: int
    kv_heads: int
    head_dim: int
    pages: int
    page: int
    width: int
    block: int
    stages: int
    geometry: ChunkGeometry | None
    shard: Shard
    unit: Warpgroup

    def scratch(self, dtype) -> dict[str, Any]:
        """Shared memory and barriers, by the names in `Scratch`."""
        slots = (self.stages, self.width, self.head_dim)
        ready = plgpu.Barrier(num_barriers=self.stages)
        free = plgpu.Barrier(num_arrivals=READERS, num_barriers=self.stages)
        rows = (READERS, ROWS, self.head_dim)
        return {
            "rows": plgpu.SMEM(rows, dtype, transforms=TILED),
            "lse": plgpu.SMEM((READERS, ROWS), jnp.float32),
            "keys": plgpu.SMEM(slots, dtype, transforms=TILED),
            "values": plgpu.SMEM(slots, dtype, transforms=TILED),
            "firsts": plgpu.SMEM((self.stages,), jnp.int32),
            "rows_ready": plgpu.Barrier(num_barriers=READERS),
            "keys_ready": ready,
            "values_ready": ready,
            "keys_free": free,
            "values_free": free,
            "turn": plgpu.Barrier(num_arrivals=READERS),
        }


class Inputs(NamedTuple):
    """References to global memory.

    Attributes:
        where: layer, start, length, the local step that the end of the sequence cuts, and the
            index of the shard.
        items: [items, ENDS + views + 1].
        queries: [views, rows, heads, H]; rows of padding are finite.
        keys: [rows of the cache, H], like values.
        tail_keys: [K * width, H] of that step, zero after the end, like values.
        words: bits of the blocks of a plan, [heads, tiles, words].
        column_keys: [heads * columns, H], like values.
        positions: positions of the columns, [heads, steps, width].
        covered: [heads, words of tiles, steps, width] by `plan.covered`.
    """

    where: Any
    table: Any
    items: Any
    queries: Any
    keys: Any
    values: Any
    tail_keys: Any
    tail_values: Any
    words: Any = None
    column_keys: Any = None
    column_values: Any = None
    positions: Any = None
    covered: Any = None


class Scratch(NamedTuple):
    """References to shared memory, and barriers.

    Attributes:
        rows: queries of each reader in one view, and its output in the end.
        firsts: the first local key of each slot, or the step of columns.
        turn: readers meet there, so that one has the tensor cores while the other has exponentials.
    """

    rows: Any
    lse: Any
    keys: Any
    values: Any
    firsts: Any
    rows_ready: Any
    keys_ready: Any
    values_ready: Any
    keys_free: Any
    values_free: Any
    turn: Any


def for_items(
    shape: Shape,
    items_ref,
    body: Callable[[Callable[..., Int[Array, ""]], Int[Array, ""]], Int[Array, ""]],
) -> Int[Array, ""]:
    """Carry a count of steps through the items of this block, whose columns `body` can read.

    Blocks take items forwards and backwards by turns, which evens out what they have to do.
    """
    block, blocks = jax.lax.axis_index(BLOCK), shape.blocks
    rounds = pl.cdiv(shape.items, blocks)

    def number(i):
        return i * blocks + jnp.where(jax.lax.rem(i, 2) == 0, block, blocks - 1 - block)

    def at(i, step):
        return body(lambda column, more=0: items_ref[number(i), column + more], step)

    mine = jnp.where(number(jnp.int32(rounds - 1)) < shape.items, rounds, rounds - 1)
    return jax.lax.fori_loop(0, mine, at, jnp.int32(0))
