"""Shapes of the attention operations that tests, benches and tuning share."""

import dataclasses

from pallas_kernels.geometry import ChunkGeometry


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Shape of the attention operations.

    Attributes:
        num_heads: query heads.
        page: tokens a page of the cache.
        geometry: DCA sizes, or None for one window.
        slice_len: queries of a prefill slice.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page: int
    geometry: ChunkGeometry | None
    slice_len: int


CASES = {
    "one window": Case(
        num_heads=2, num_kv_heads=1, head_dim=16, page=8, geometry=None, slice_len=16
    ),
    "tiles fit the chunk": Case(
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        page=8,
        geometry=ChunkGeometry(chunk_size=32, local_size=8),
        slice_len=16,
    ),
    "tiles straddle the chunk": Case(
        num_heads=3,
        num_kv_heads=3,
        head_dim=8,
        page=8,
        geometry=ChunkGeometry(chunk_size=17, local_size=4),
        slice_len=12,
    ),
    "chunks smaller than a tile": Case(
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        page=16,
        geometry=ChunkGeometry(chunk_size=5, local_size=2),
        slice_len=16,
    ),
    "local size beyond the chunk": Case(
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        page=4,
        geometry=ChunkGeometry(chunk_size=16, local_size=12),
        slice_len=8,
    ),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Served(Case):
    """Shape at which one device serves a model.

    Attributes:
        num_layers: layers of the cache.
        context: tokens of the sequence, of which the slice is the last.
        num_pages: pages of the cache, fewer than the context has where it is shared out.
        num_columns: columns that a head reads at most, in sparse prefill.
        num_seqs: sequences of a decode step.
        parts: devices that share heads and sequence: their numbers multiply.
    """

    num_layers: int
    context: int
    num_pages: int
    num_columns: int
    num_seqs: int = 1
    parts: tuple[int, int] = (1, 1)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values in bfloat16."""
        page_bytes = 2 * 2 * self.num_kv_heads * self.page * self.head_dim
        return self.num_layers * self.num_pages * page_bytes


SMALL = Served(
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    page=256,
    geometry=ChunkGeometry(chunk_size=1024, local_size=256),
    slice_len=512,
    context=2048,
    num_pages=9,
    num_columns=64,
)
"""Small enough to be timed on a CPU; of its layers only what shows that they are there."""
