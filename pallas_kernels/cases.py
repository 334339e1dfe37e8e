"""Named shapes that tests, benches and tuning share."""

import dataclasses

from pallas_kernels.geometry import ChunkGeometry


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape of the attention operations.

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
