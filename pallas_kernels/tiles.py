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


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of `n` that is at most `limit`."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)
