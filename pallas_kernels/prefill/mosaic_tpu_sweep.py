"""The TPU kernel of prefill: which keys a tile of queries attends to, and when they come.

Of a shard, what is fetched goes by local keys, what is seen by positions; the keys of a piece
follow one another in both.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.prefill.mosaic_tpu_tile import FAR, Tile
from pallas_kernels.softmax import MASKED

WORD, BYTE = 32, 8  # bits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
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
        """Mask of the columns of step j that lie in a block that the tile reads, [1, width]."""
        bit = jax.lax.rem(pl.program_id(1), WORD)
        return jax.lax.shift_right_logical(self.covered_ref[j], bit) & 1 > 0


def _sweep(
    tile: Tile,
    layer,
    keys_ref,
    values_ref,
    row_at,
    piece_at,
    number,
    columns: Any = None,
):
    """Attend to `number` steps of pieces, then to columns.

    Args:
        row_at: row of a head's cache at which piece b of step j begins; any piece's row if it
            does not count.
        piece_at: position of piece b of step j, and whether it counts.
        columns: `Columns` to attend to as well, or None.
    """
    shape = tile.shape
    head = jax.lax.div(pl.program_id(0), jnp.int32(shape.kv_group))
    cache_head = layer * shape.kv_heads + head
    packed = columns is not None  # else all steps are of pieces
    total = number + columns.number if packed else number

    def copy(source, into, buffer, slot):
        pltpu.make_async_copy(source, buffer.at[slot, into], tile.semaphores.at[slot]).start()

    def fetch_piece(row, b, slot):
        rows = pl.ds(pl.multiple_of(row, shape.piece), shape.piece)
        into = pl.ds(pl.multiple_of(b * shape.piece, shape.piece), shape.piece)
        copy(keys_ref.at[cache_head, rows], into, tile.key_ref, slot)
        copy(values_ref.at[cache_head, rows], into, tile.value_ref, slot)

    def fetch(j, slot):
        def piece(b, _):
            fetch_piece(row_at(j, b), b, slot)
            return 0

        @pl.when(j < number)
        def _():
            jax.lax.fori_loop(0, shape.pieces, piece, 0)

        if not packed:
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

        def body(i, _):
            begin = i * shape.sub
            positions = lane + position_of(j, begin)
            for key in range(shape.piece, shape.sub, shape.piece):
                first = position_of(j, begin + key)
                positions = jnp.where(lane >= key, lane - key + first, positions)
            tile.positions_ref[i] = positions
            return 0

        jax.lax.fori_loop(0, shape.width // shape.sub, body, 0)

    def step(j, _):
        slot = jax.lax.rem(j, 2)
        tile.wait(slot)
        listed = j < number
        column = jnp.maximum(j - number, 0)
        first, last = position_of(j, 0), position_of(j, shape.width - 1)
        if packed:
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
            rows = [row_at(j + 1, b) for b in range(shape.pieces)]

            def ahead():
                for b, row in enumerate(rows):
                    fetch_piece(row, b, 1 - slot)

            tile.attend_whole(slot, near, ahead=ahead)

        @pl.when(jnp.logical_not(plain))
        def _():
            fetch(j + 1, 1 - slot)

        cut = jnp.logical_not(plain)
        if packed:
            cut &= listed | jnp.logical_not(whole)

            @pl.when(whole & jnp.logical_not(listed))
            def _():
                in_block = columns.in_block(column)
                tile.attend_whole(slot, near, bias=jnp.where(in_block, MASKED, 0.0))

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


def dense(shape, where_ref, table_ref, q_ref, keys_ref, values_ref, out_ref, lse_ref, *scratch):
    """A tile of queries over all keys."""
    tile = Tile(shape, where_ref, q_ref, out_ref, lse_ref, scratch)
    tile.start()

    def key_at(j, b):
        first = j * shape.width + b * shape.piece
        final = jax.lax.div(tile.last_key, jnp.int32(shape.piece)) * shape.piece
        return jnp.minimum(first, final), first <= final

    def piece_at(j, b):
        first, counts = key_at(j, b)
        return tile.shard.position(first), counts

    def row_at(j, b):
        first, _ = key_at(j, b)
        page = table_ref[jax.lax.div(first, jnp.int32(shape.page))]
        return page * shape.page + jax.lax.rem(first, jnp.int32(shape.page))

    number = jnp.where(tile.first_row < tile.length, pl.cdiv(tile.last_key + 1, shape.width), 0)
    _sweep(tile, where_ref[0], keys_ref, values_ref, row_at, piece_at, number)
    tile.finish()


def sparse(
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
    tile = Tile(shape, where_ref, q_ref, out_ref, lse_ref, scratch)
    tile.start()
    wanted = tile.first_row < tile.length
    span = math.gcd(shape.page // shape.piece, BYTE)  # bits that lie in one page
    last_page = jax.lax.div(tile.last_key, jnp.int32(shape.page))

    def append(byte, count):
        word = words_ref[0, jax.lax.div(byte, jnp.int32(WORD // BYTE))]
        shift = BYTE * jax.lax.rem(byte, jnp.int32(WORD // BYTE))
        bits = jax.lax.shift_right_logical(word, shift)

        def some():
            end = count
            for bit in range(BYTE):
                first = (BYTE * byte + bit // span * span) * shape.piece
                page = jnp.minimum(jax.lax.div(first, jnp.int32(shape.page)), last_page)
                base = table_ref[page] * shape.page + jax.lax.rem(first, jnp.int32(shape.page))
                block_ref[end] = BYTE * byte + bit
                row_ref[end] = base + bit % span * shape.piece
                end += jax.lax.shift_right_logical(bits, jnp.int32(bit)) & 1
            return end

        return jax.lax.cond(bits & (2**BYTE - 1) != 0, some, lambda: count)

    bytes_ = jnp.where(wanted, pl.cdiv(tile.last_key + 1, BYTE * shape.piece), 0)
    count = jax.lax.fori_loop(0, bytes_, append, jnp.int32(0))

    def rank_of(j, b):
        return jnp.clip(j * shape.pieces + b, 0, jnp.maximum(count - 1, 0))

    def piece_at(j, b):
        first = tile.shard.position(block_ref[rank_of(j, b)] * shape.piece)
        return first, j * shape.pieces + b < count

    def row_at(j, b):
        return row_ref[rank_of(j, b)]

    def later(j, number):
        return number + (spans_ref[0, 2 * j] <= tile.last).astype(jnp.int32)

    steps = jax.lax.fori_loop(0, spans_ref.shape[1] // 2, later, jnp.int32(0))
    columns = Columns(
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
