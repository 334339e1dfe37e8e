"""SparsePlan: which keys each tile of queries reads, per query head; one format for all backends.

A tile of queries reads whole blocks of keys, a bit each, and the single columns that none
of its blocks covers. Blocks and columns are positions in the sequence, so the three regions
of Dual Chunk Attention share one plan; those of a shard are local. Nothing outside this file
knows the layout.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.dispatch.backend import LANES
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.shard import WHOLE, Shard

ABSENT = 2**31 - 1
"""Position of a column that is not there: after every key."""
_WORD = 32  # bits


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["blocks", "columns"], meta_fields=["tiles"]
)
@dataclasses.dataclass(frozen=True, slots=True)
class SparsePlan:
    """Keys that a slice of T queries reads: blocks per tile of queries, and single columns.

    Attributes:
        blocks: bit b of word w of a tile says that the tile reads key block `32 w + b`.
        columns: ascending positions of single keys, for all tiles of a head, then `ABSENT`.
        tiles: queries a tile and keys a block.
    """

    blocks: UInt32[Array, "N tiles words"]
    columns: Int[Array, "N V"]
    tiles: Tiles

    def reads(self) -> Bool[Array, "N tiles blocks"]:
        """Unpack the mask of the blocks that each tile reads."""
        bits = self.blocks[..., None] >> jnp.arange(_WORD, dtype=jnp.uint32) & 1
        return bits.reshape(*self.blocks.shape[:-1], -1).astype(bool)

    def before(self, blocks: Int[Array, "N tiles *B"]) -> Int[Array, "N tiles *B"]:
        """Count the blocks that each tile reads before given ones."""
        words = jnp.pad(self.blocks, ((0, 0), (0, 0), (0, 1)))
        in_words = jax.lax.population_count(words).astype(jnp.int32)
        upto = jnp.cumsum(in_words, -1, dtype=jnp.int32) - in_words
        flat = blocks.reshape(*blocks.shape[:2], -1)
        word, bit = flat // _WORD, (flat % _WORD).astype(jnp.uint32)
        last = jnp.take_along_axis(words, word, 2) & ((jnp.uint32(1) << bit) - jnp.uint32(1))
        found = jnp.take_along_axis(upto, word, 2)
        found += jax.lax.population_count(last).astype(jnp.int32)
        return found.reshape(blocks.shape)


def build(
    verticals: Bool[Array, "N S"],
    slashes: Bool[Array, "N S"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    num_queries: int,
    num_columns: int,
    tiles: Tiles,
    shard: Shard = WHOLE,
) -> SparsePlan:
    """Build a plan from selected columns and diagonals of a slice (arXiv:2407.02490, section 3.2).

    A diagonal gives a tile every block that it crosses in the tile's rows, so a tile
    reads a superset of the selected keys; blocks after a tile's last query are left out.

    Args:
        verticals: columns every query of the slice reads.
        slashes: diagonals, each at the key that it holds in the last query's row.
        start: position of the first query.
        length: queries that count; tiles past them read nothing.
        num_queries: rows of the slice with its padding, T.
        num_columns: columns that a head has at most, V.
        shard: shard whose keys the columns, diagonals and plan refer to, inside `shard_map`;
            `tiles.k` divides its part of a page.
    """
    slashes = shard.gather(slashes)
    N, S = slashes.shape
    B, count = tiles.k, -(-num_queries // tiles.q)
    num_blocks = -(-S // (B * _WORD)) * _WORD
    last = start + length - 1
    # before[s]: selected diagonals whose key in the last row lies before s.
    before = jnp.pad(jnp.cumsum(slashes, -1, dtype=jnp.int32), ((0, 0), (1, 0)))
    rest = num_blocks * B + (-(-num_queries // B) + 2) * B - S - 1
    before = jnp.pad(before, ((0, 0), (0, rest)), mode="edge").reshape(N, -1, B)
    first_keys = jnp.arange(num_blocks, dtype=jnp.int32) * B

    # The rows of a tile cross a block from its first key on, moved by as many keys as rows lie
    # after them. Tiles whose moves agree modulo the block look in the same places.
    kinds = B // math.gcd(B, tiles.q)
    after = length - 1 - jnp.arange(kinds, dtype=jnp.int32) * tiles.q

    def column(place):
        return jax.lax.dynamic_index_in_dim(before, place % B, 2, False)

    from_first, from_final = (jax.lax.map(column, x) for x in (after, after - tiles.q + 1))
    from_last = before[:, :num_blocks, 0]

    def own(reads):
        if shard.count == 1:
            return reads
        reads = shard.own(reads[:, : S // B], B)
        return jnp.pad(reads, ((0, 0), (0, -reads.shape[1] % _WORD)))

    def blocks_of(tile):
        first = start + tile * tiles.q
        final = jnp.minimum(first + tiles.q - 1, last)

        def before_blocks(columns, offset):  # how many lie before each block's first key + offset
            of_kind = jax.lax.dynamic_index_in_dim(columns, tile % kinds, 0, False)
            return jax.lax.dynamic_slice_in_dim(of_kind, offset // B, num_blocks, 1)

        upto = before_blocks(from_first, last - first + B)
        below = jnp.where(final < last, before_blocks(from_final, last - final), from_last)
        reads = (upto > below) & (first_keys <= final) & (first <= last)
        return _packed(own(reads))

    blocks = jax.lax.map(blocks_of, jnp.arange(count, dtype=jnp.int32)).swapaxes(0, 1)
    return SparsePlan(blocks, _positions(verticals, num_columns), tiles)


def everything(
    plan: SparsePlan,
    heads: Bool[Array, " N"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    shard: Shard = WHOLE,
) -> SparsePlan:
    """A plan of the same shape that reads all keys in some heads and none in the others."""
    tile = jnp.arange(plan.blocks.shape[1], dtype=jnp.int32)
    final = jnp.minimum(start + (tile + 1) * plan.tiles.q, start + length) - 1
    first_keys = jnp.arange(plan.blocks.shape[2] * _WORD, dtype=jnp.int32) * plan.tiles.k
    first_keys = shard.position(first_keys)
    reads = (first_keys <= final[:, None]) & (tile * plan.tiles.q < length)[:, None]
    blocks = jnp.where(heads[:, None, None], _packed(reads), jnp.uint32(0))
    return SparsePlan(blocks, jnp.full_like(plan.columns, ABSENT), plan.tiles)


def _packed(reads: Bool[Array, "*B blocks"]) -> UInt32[Array, "*B words"]:
    bits = reads.reshape(*reads.shape[:-1], -1, _WORD).astype(jnp.uint32)
    return (bits << jnp.arange(_WORD, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)


def _positions(chosen: Bool[Array, "N S"], most: int) -> Int[Array, "N V"]:
    """Indices where `chosen` is true, ascending, in the first of `most` places."""
    upto = jnp.cumsum(chosen, -1, dtype=jnp.int32)
    place = jnp.arange(most, dtype=jnp.int32)
    found = jax.lax.map(functools.partial(_number_up_to, limit=place), upto)
    return jnp.where(place < upto[:, -1:], found, ABSENT)


def _number_up_to(ascending: Int[Array, " n"], limit: Int[Array, " v"]) -> Int[Array, " v"]:
    """Count the entries of `ascending` that are at most each limit.

    A search that compares whole registers: a TPU takes as long to fetch one number.
    """
    if len(ascending) <= LANES:
        return (ascending <= limit[:, None]).sum(-1, dtype=jnp.int32)
    rest = -len(ascending) % LANES
    rows = jnp.pad(ascending, (0, rest), constant_values=ABSENT).reshape(-1, LANES)
    row = _number_up_to(rows[:, -1], limit)
    inside = (jnp.take(rows, row, axis=0, mode="clip") <= limit[:, None]).sum(-1, dtype=jnp.int32)
    return row * LANES + inside


def covered(plan: SparsePlan, columns: Int[Array, "N V"]) -> UInt32[Array, "N words V"]:
    """Bits of the tiles that read the block of each column: bit b of word w is tile 32 w + b."""
    num_tiles, words = plan.blocks.shape[1:]

    def of_head(head):
        blocks, columns = head
        block = jnp.minimum(columns // plan.tiles.k, words * _WORD - 1)
        reads = blocks[:, block // _WORD] >> (block % _WORD).astype(jnp.uint32) & 1
        reads = jnp.pad(reads, ((0, -num_tiles % _WORD), (0, 0)))
        reads = reads.reshape(-1, _WORD, reads.shape[1])
        return (reads << jnp.arange(_WORD, dtype=jnp.uint32)[:, None]).sum(1, dtype=jnp.uint32)

    return jax.lax.map(of_head, (plan.blocks, columns))


def to_mask(
    plan: SparsePlan,
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    num_keys: int,
    shard: Shard = WHOLE,
) -> Bool[Array, "N T S"]:
    """The pairs that a small plan reads, causal, for its first `length` queries."""
    blocks = plan.reads().repeat(plan.tiles.k, -1)[..., :num_keys]
    key = jnp.arange(num_keys, dtype=jnp.int32)
    columns = (plan.columns[..., None] == key).any(1)
    rows = (blocks | columns[:, None]).repeat(plan.tiles.q, 1)
    row = jnp.arange(rows.shape[1], dtype=jnp.int32)
    return rows & (shard.position(key) <= start + row[:, None]) & (row < length)[:, None]


def density(
    plan: SparsePlan, start: Int[Array, ""], length: Int[Array, ""], *, shard: Shard = WHOLE
) -> Float[Array, " N"]:
    """Pairs that a kernel computes by the plan, as a share of those that it would without.

    Both count whole blocks, so a plan that leaves out nothing has density 1. Of the plans of
    all shards together, inside `shard_map`.
    """
    q, B = plan.tiles.q, plan.tiles.k
    reads = plan.reads()
    tile = jnp.arange(reads.shape[1], dtype=jnp.int32)
    final = jnp.minimum(start + (tile + 1) * q, start + length) - 1
    rows = jnp.clip(length - tile * q, 0, q).astype(jnp.float32)
    # A column costs a tile something unless a block covers it or it comes later.
    block = jnp.minimum(plan.columns // B, reads.shape[2] - 1)
    covered = jnp.take_along_axis(reads, block[:, None], 2)
    single = ((plan.columns[:, None] < shard.before(final + 1)[:, None]) & ~covered).sum(-1)
    kept = (reads.sum(-1) * B + single).astype(jnp.float32) @ rows
    return shard.sum(kept) / (((final // B + 1) * B).astype(jnp.float32) @ rows)
