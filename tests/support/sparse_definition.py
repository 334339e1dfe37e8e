"""Which pairs a sparse prefill reads, in float64 and from the definition, piece by piece.

The last queries of a piece vote with relative positions that never jump along a diagonal
(arXiv:2501.15383, section 5); what they choose holds for the piece.
"""

import numpy as np

from pallas_kernels.dispatch.tiles import Tiles
from qwen_jax.config import ModelConfig, SparseConfig
from support import definition, sparse_oracle


class Reads:
    """A `read` of `definition.logits`.

    Args:
        pieces: first position and length of each.
        scale: temperature factor on every query.
        tiles: rows of a piece that share their blocks, and keys a block.
    """

    def __init__(
        self,
        config: ModelConfig,
        pieces: list[tuple[int, int]],
        budgets: SparseConfig,
        scale: float,
        tiles: Tiles,
    ):
        self._config, self._pieces, self._budgets = config, pieces, budgets
        self._scale = scale / np.sqrt(config.head_dim)
        self._tiles = tiles
        self.closest = np.inf
        """Least relative distance between a chosen vote and one that was not."""

    def __call__(self, layer: int, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        N, T, _ = q.shape
        reads = np.ones((N, T, T), bool)
        if layer == self._config.num_layers - 1:  # of which one row is used, and it reads all
            return reads
        for n in range(N):
            key = k[n // (N // len(k))]
            vertical, slash = self._budgets.vertical[layer][n], self._budgets.slash[layer][n]
            for start, length in self._pieces:
                rows = slice(start, start + length)
                reads[n, rows] = self._piece(q[n], key, start, length, vertical, slash)
        return reads

    def _piece(self, q, k, start, length, vertical, slash):
        e = start + length
        columns, diagonals = self._votes(q, k, start, length)
        columns = self._largest(columns, vertical, np.arange(min(30, e)))
        diagonals = self._largest(diagonals, slash, np.arange(max(e - 100, 0), e))
        q_tile, k_block = self._tiles.q, self._tiles.k
        blocks = sparse_oracle.blocks(
            diagonals, start, length, self._config.dual_chunk, q_tile, k_block
        )
        reads = np.zeros((length, len(q)), bool)
        reads[:, :e] = blocks.repeat(q_tile, 0)[:length].repeat(k_block, 1)[:, :e]
        reads[:, columns] = True
        return reads

    def _votes(self, q, k, start, length):
        e, geometry = start + length, self._config.dual_chunk
        rows = np.arange(e - min(self._budgets.last_q, length), e)
        keys = np.arange(e)
        relative = rows[:, None] - keys
        if geometry is not None:
            chunk = geometry.chunk_size - geometry.local_size
            old = rows[:, None] // chunk - keys // chunk >= 2
            beyond = rows[:, None] % chunk + geometry.chunk_size - keys % chunk
            relative = np.where(old, beyond, relative)
        turned = definition.rotation(self._config, relative)
        scores = definition.rotated_scores(q[rows], k[:e], *turned) * self._scale
        scores = np.where(keys <= rows[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        diagonals = np.zeros(e)
        for back, row in enumerate(weights[::-1]):
            diagonals[back:] += row[: e - back]
        return weights.sum(0), diagonals

    def _largest(self, values, budget, forced):
        chosen = sparse_oracle.largest(values, budget, forced)
        free = np.setdiff1d(chosen, forced)
        rest = np.setdiff1d(np.arange(len(values)), np.union1d(chosen, forced))
        if len(free) and len(rest):
            least, most = values[free].min(), values[rest].max()
            self.closest = min(self.closest, (least - most) / least)
        return chosen
