"""PlanPicture: the sparse plans of one head over a whole prompt, rasterised to pixels."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.plan import ABSENT, SparsePlan

# Colour-blind-safe (Okabe and Ito): blue and vermilion differ in lightness and in hue.
BLOCKS = (0, 90, 160)
COLUMNS = (213, 94, 0)
UNREAD = (255, 255, 255)
_FAINTEST = 0.25  # of a colour: below, a single column of a long prompt would not be seen


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanPicture:
    """Sparse plans of one head over a prompt, slice by slice.

    Attributes:
        tokens: length of the prompt.
        tiles: queries per tile and keys per block.
        slices: first query, number of queries, and plan of each slice; plans are of this head
            only (N = 1). Queries that no slice covers are shown as not read.
        chunk_len: tokens by which a chunk of DCA advances; None without DCA.
        vertical: column budget.
        slash: diagonal budget.
        density: computed pairs of query and key as a fraction of the causal ones.
        recall: attention mass of the computed pairs as a fraction of all.
    """

    tokens: int
    tiles: Tiles
    slices: tuple[tuple[int, int, SparsePlan], ...]
    chunk_len: int | None
    layer: int
    head: int
    vertical: int
    slash: int
    density: float
    recall: float

    @property
    def title(self) -> str:
        """Title of two lines: layer, head and budgets; density and recall."""
        return (
            f"layer {self.layer}, head {self.head}: budgets of {self.vertical:,} columns and "
            f"{self.slash:,} diagonals, {self.tokens:,} tokens\n"
            f"density {self.density:.3f}, recall {self.recall:.3f}, "
            f"tiles of {self.tiles.q} queries and {self.tiles.k} keys"
        )


class Raster(NamedTuple):
    """Fractions of the causal pairs in each pixel, queries downwards and keys to the right.

    Attributes:
        blocks: fraction of pairs read in whole blocks; NaN where no pair is causal.
        columns: fraction of pairs read as single columns; NaN where no pair is causal.
    """

    blocks: Float[np.ndarray, "rows columns"]
    columns: Float[np.ndarray, "rows columns"]


def rasterise(picture: PlanPicture, rows: int, columns: int) -> Raster:
    """Rasterises the plans to `rows` x `columns` pixels, at most one for each token.

    Counts are exact. Memory grows with pixels and with blocks per slice, not with pairs.
    """
    rows, columns = min(rows, picture.tokens), min(columns, picture.tokens)
    row_edges, column_edges = edges(picture.tokens, rows), edges(picture.tokens, columns)
    pixel_of_row = np.repeat(np.arange(rows), np.diff(row_edges))
    pixel_of_key = np.repeat(np.arange(columns), np.diff(column_edges))
    read = np.zeros((2, rows, columns))
    for start, length, plan in picture.slices:
        bits, single = np.asarray(plan.reads())[0], np.asarray(plan.columns)[0]
        single = single[single != ABSENT]
        for tile, first, stop in _bands(start, length, plan.tiles.q, row_edges):
            read[:, pixel_of_row[first]] += _band(
                bits[tile], single, plan.tiles.k, first, stop, column_edges, pixel_of_key
            )
    causal = _causal_pairs(row_edges, column_edges)
    share = np.where(causal, read / np.maximum(causal, 1), np.nan)
    return Raster(blocks=share[0], columns=share[1])


def edges(tokens: int, pixels: int) -> Int[np.ndarray, " edges"]:
    """Returns the first token of each pixel, followed by `tokens`."""
    return np.arange(pixels + 1) * tokens // pixels


def _bands(
    start: int, length: int, q: int, row_edges: Int[np.ndarray, " edges"]
) -> Iterator[tuple[int, int, int]]:
    """Yields tile index, first and end of each run of queries that share tile and pixel row."""
    stop = start + length
    borders = np.union1d(np.arange(start, stop, q), row_edges)
    borders = [*borders[(borders >= start) & (borders < stop)].tolist(), stop]
    for first, following in itertools.pairwise(borders):
        yield (first - start) // q, first, following


def _band(
    reads: Bool[np.ndarray, " blocks"],
    single: Int[np.ndarray, " V"],
    block: int,
    first: int,
    stop: int,
    column_edges: Int[np.ndarray, " edges"],
    pixel_of_key: Int[np.ndarray, " S"],
) -> Float[np.ndarray, "2 columns"]:
    """Counts pairs of queries [first, stop) with the keys of each pixel: by block, by column."""
    # Keys before `first` are seen by every query; a later key k by `stop - k` of them.
    upto = np.concatenate([[0], np.cumsum(reads)]) * block
    edge = np.minimum(column_edges, first)
    keys = upto[edge // block] + np.append(reads, False)[edge // block] * (edge % block)
    by_block = np.diff(keys) * float(stop - first)
    late = np.arange(first, stop)
    late = late[reads[late // block]]
    single = single[single < stop]
    single = single[~reads[single // block]]
    pixels = functools.partial(np.bincount, minlength=len(by_block))
    by_block += pixels(pixel_of_key[late], stop - late)
    seen_by = np.minimum(stop - single, stop - first)
    return np.stack([by_block, pixels(pixel_of_key[single], seen_by)])


def _causal_pairs(
    row_edges: Int[np.ndarray, " R"], column_edges: Int[np.ndarray, " C"]
) -> Int[np.ndarray, "rows columns"]:
    q, k = row_edges[:, None], column_edges[None]
    near = np.minimum(q, k)
    # Pairs of queries before q with keys before k: a triangle, and full rows below it.
    before = near * (near + 1) // 2 + (q - near) * k
    return np.diff(np.diff(before, axis=0), axis=1)


def colours(raster: Raster) -> UInt8[np.ndarray, "rows columns 3"]:
    """Colours pixels: blue for blocks, vermilion for columns, white for unread or not causal.

    Saturation grows with the square root of the fraction, and is at least 1/4 for anything read.
    """
    image = np.full((*raster.blocks.shape, 3), UNREAD, float)
    for share, colour in ((raster.columns, COLUMNS), (raster.blocks, BLOCKS)):
        share = np.nan_to_num(share)[..., None]
        strength = np.where(share > 0, _FAINTEST + (1 - _FAINTEST) * np.sqrt(share), 0)
        image += strength * (np.asarray(colour) - image)
    return image.round().astype(np.uint8)
