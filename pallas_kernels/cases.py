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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Served(Case):
    """A case at the size at which one device serves it.

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
        """Keys and values in bfloat16."""
        page_bytes = 2 * 2 * self.num_kv_heads * self.page * self.head_dim
        return self.num_layers * self.num_pages * page_bytes


_PUBLISHED = ChunkGeometry(chunk_size=262_144, local_size=8_192)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A published model, as far as attention and memory go.

    Attributes:
        weight_bytes: in bfloat16.
        num_columns: the largest vertical budget of its sparse_attention_config.json.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    weight_bytes: int
    num_columns: int
    head_dim: int = 128
    geometry: ChunkGeometry = _PUBLISHED

    def served(self, context: int, *, tensor: int = 1, seq: int = 1, **more: int) -> Served:
        """What one of `tensor` x `seq` devices holds: its heads, and its share of the pages."""
        page = 1024
        in_all = -(-context // page)
        sizes = {
            "num_layers": self.num_layers,
            "num_heads": self.num_heads // tensor,
            "num_kv_heads": self.num_kv_heads // tensor,
            "num_pages": -(-in_all // seq) + 1,  # and one for padding
            "slice_len": min(32_768, context),
            "num_columns": self.num_columns,
        }
        return Served(
            head_dim=self.head_dim,
            page=page,
            geometry=self.geometry,
            context=context,
            parts=(tensor, seq),
            **sizes | more,
        )

    def share(self, context: int, memory: int, **more: int) -> Served:
        """What a device holds of the smallest mesh that leaves two fifths of its memory free.

        Heads are shared out first, as far as there are kv heads, then the sequence.
        """
        tensor = seq = 1
        while True:
            found = self.served(context, tensor=tensor, seq=seq, **more)
            if 5 * (found.cache_bytes + self.weight_bytes // tensor) <= 3 * memory:
                return found
            if tensor < self.num_kv_heads:
                tensor *= 2
            else:
                seq *= 2


MODELS = {
    "7B": Model(
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        weight_bytes=2 * 7_615_616_512,
        num_columns=22_032,
    ),
    "14B": Model(
        num_layers=48,
        num_heads=40,
        num_kv_heads=8,
        weight_bytes=2 * 14_770_033_664,
        num_columns=15_744,
    ),
}

# To be timed on one device: of the layers only what shows that they are there.
SERVED = {
    "small at 2k": Served(
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
    ),
    "7B at 32k": MODELS["7B"].served(32_768, num_layers=2),
    "7B at 256k": MODELS["7B"].served(262_144, num_layers=2),
    "7B at 1M": MODELS["7B"].served(1_010_000, num_layers=2),
    "7B at 32k x 32": MODELS["7B"].served(32_768, num_layers=2, num_seqs=32, num_pages=1025),
    "14B at 1M": MODELS["14B"].served(1_010_000, num_layers=2),
}
