"""Dual Chunk Attention in integers: the view of each pair, the rotary position of each view.

Works on Python integers, numpy and jax arrays alike (arXiv:2402.17463, section 3).
"""

import dataclasses

INTRA, SUCC, INTER = 0, 1, 2
"""Views of a query: for keys of its own chunk, of the one before it, of all older ones."""


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkGeometry:
    """Sizes of DCA, in tokens.

    Attributes:
        chunk_size: largest relative position the model may see.
        local_size: overlap between neighbouring chunks, so a query at the start
            of a chunk still sees recent keys at their true distance.

    Raises:
        ValueError: if `local_size` is not in (0, chunk_size).
    """

    chunk_size: int
    local_size: int

    def __post_init__(self):
        if not 0 < self.local_size < self.chunk_size:
            raise ValueError(
                f"local_size must be in (0, chunk_size); got {self.local_size=} "
                f"with {self.chunk_size=}"
            )

    @property
    def chunk_len(self) -> int:
        """Tokens by which one chunk advances."""
        return self.chunk_size - self.local_size

    def view(self, q_pos, k_pos):
        """View (0, 1 or 2) of the pair (q_pos, k_pos); callers mask k_pos > q_pos."""
        return (q_pos // self.chunk_len - k_pos // self.chunk_len).clip(INTRA, INTER)

    def query_positions(self, pos):
        """Rotary positions of a query, one per view, in the order of the constants.

        A key is rotated to `key_position`, the same for every view.
        """
        intra = pos % self.chunk_len
        succ = (intra + self.chunk_len).clip(max=self.chunk_size)
        inter = 0 * pos + min(2 * self.chunk_len - 1, self.chunk_size)
        return intra, succ, inter

    @property
    def critical_offsets(self):
        """Rotary distance of each view of a query, when it votes, from its first view.

        Unlike `query_positions` they never stop growing along a chunk, so that one diagonal
        of the scores has one relative position (arXiv:2501.15383, section 5).
        """
        return 0, self.chunk_len, self.chunk_size

    def key_position(self, pos):
        """Rotary position of a key: the same for every view, so it can be cached."""
        return pos % self.chunk_len
