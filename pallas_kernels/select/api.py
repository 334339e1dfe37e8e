"""The selection operation that users call."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import backend
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.select.top import top
from pallas_kernels.shard import WHOLE, Shard

FORCED_COLUMNS = 30
"""Columns at the start of the sequence that are always read (attention sinks)."""
FORCED_DIAGONALS = 100
"""Diagonals nearest to the query that are always read."""


class Selection(NamedTuple):
    """Masks of the columns and diagonals that each query head of a slice reads.

    Attributes:
        verticals: columns, at their position.
        slashes: diagonals, at the position that each has in the last query's row.
    """

    verticals: Bool[Array, "N S"]
    slashes: Bool[Array, "N S"]


class Votes(NamedTuple):
    """Sums of softmax weights of a slice's last queries.

    Attributes:
        columns: at the position of each.
        diagonals: at the position that each has in the last query's row.
    """

    columns: Float[Array, "N S"]
    diagonals: Float[Array, "N S"]


def select(
    queries: Float[Array, "views R N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    vertical: Int[Array, " N"],
    slash: Int[Array, " N"],
    *,
    geometry: ChunkGeometry | None,
    shard: Shard = WHOLE,
    backend_name: backend.Choice = None,
) -> Selection:
    """Select the columns and diagonals that hold most attention of a slice's last queries.

    The last R queries of the slice, or as many as it has, vote with their softmax over
    all keys: a column gets the sum of its weights, a diagonal of those along it
    (arXiv:2407.02490, section 3.2; arXiv:2501.15383, section 5). The first
    `FORCED_COLUMNS` and the nearest `FORCED_DIAGONALS` come first and count against the
    budgets. Ties go to the lower position.

    Args:
        queries: the last R queries of the slice, the last in the last row, rotated for each view by
            `geometry.critical_offsets`, and multiplied by the softmax scale; rows before the
            slice are ignored. One view if `geometry` is None.
        cache: keys and values of all layers; only keys are read.
        start: position of the slice's first query.
        length: queries of the slice.
        vertical: columns to keep per query head; more than there are keeps all.
        slash: diagonals to keep.
        shard: which part of each page the cache holds; inside `shard_map`, where all shards
            vote together.

    Returns:
        Masks over S = P x page positions, or those of local keys.

    Raises:
        Unsupported: if the backend does not run here or cannot take these shapes.
    """
    votes = vote(
        queries,
        cache,
        layer,
        page_table,
        start,
        length,
        geometry=geometry,
        shard=shard,
        backend_name=backend_name,
    )
    return select_keys(votes, start + length, vertical, slash, shard=shard)


def vote(
    queries: Float[Array, "views R N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    shard: Shard = WHOLE,
    backend_name: backend.Choice = None,
) -> Votes:
    """Sum the attention of the last queries by column and by diagonal: first half of `select`.

    Reads keys only.

    Raises:
        Unsupported: if the backend does not run here or cannot take these shapes.
    """
    args = queries, cache, layer, page_table, start, length
    return Votes(*backend.call("select", backend_name, *args, geometry=geometry, shard=shard))


def select_keys(
    votes: Votes,
    end: Int[Array, ""],
    vertical: Int[Array, " N"],
    slash: Int[Array, " N"],
    *,
    shard: Shard = WHOLE,
) -> Selection:
    """Keep the largest votes of the first `end` positions: second half of `select`."""
    return Selection(
        top(votes.columns, vertical, low=0, high=FORCED_COLUMNS, end=end, shard=shard),
        top(votes.diagonals, slash, low=end - FORCED_DIAGONALS, high=end, end=end, shard=shard),
    )
