"""Tile sizes: how many queries and keys a kernel handles at a time. Speed, not numerics."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """Rows and columns of one block of scores.

    Attributes:
        q: rows a tile: query positions times the query heads that share a kv head.
        k: keys a tile.
    """

    q: int
    k: int


def split(total: int, most: int) -> tuple[int, int]:
    """How many tiles of at most `most` cover `total`, and the size of each."""
    count = -(-total // most)
    return count, -(-total // count)


def of_page(page: int, most: int) -> int:
    """Keys a tile: the largest divisor of the page up to `most`, or all of an odd page."""
    tile = max(d for d in range(1, min(page, most) + 1) if page % d == 0)
    return tile if tile >= min(page, 64) else page
