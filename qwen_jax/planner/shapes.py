"""Attention shapes of the published models on one device, to compare, time, tune and compile."""

import dataclasses
from typing import Any

from pallas_kernels.cases import SMALL, Served
from pallas_kernels.check import Shape
from pallas_kernels.geometry import ChunkGeometry

_PUBLISHED = ChunkGeometry(chunk_size=262_144, local_size=8_192)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of a published model that matter to attention and memory.

    Attributes:
        weight_bytes: bytes of its weights in bfloat16.
        num_columns: largest vertical budget of its sparse_attention_config.json.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    weight_bytes: int
    num_columns: int
    head_dim: int = 128
    geometry: ChunkGeometry = _PUBLISHED

    def compared(self, *, dtype: str, **more: Any) -> Shape:
        """Returns the shape on which `pallas_kernels.check` compares kernels, on one device."""
        sizes = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "page": 1024,
            "geometry": self.geometry,
        }
        return Shape(dtype=dtype, **sizes | more)

    def served(self, context: int, *, tensor: int = 1, seq: int = 1, **more: int) -> Served:
        """Returns the part of one of `tensor` x `seq` devices: its heads and share of the pages.

        Args:
            context: tokens of the context.
        """
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
        """Returns a device's part on the smallest mesh that leaves 2/5 of its memory free.

        `tensor` grows first, up to the number of KV heads, then `seq`.

        Args:
            context: tokens of the context.
            memory: bytes of a device.
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

SERVED = {
    "small at 2k": SMALL,
    "7B at 32k": MODELS["7B"].served(32_768, num_layers=2),
    "7B at 256k": MODELS["7B"].served(262_144, num_layers=2),
    "7B at 1M": MODELS["7B"].served(1_010_000, num_layers=2),
    "7B at 32k x 32": MODELS["7B"].served(32_768, num_layers=2, num_seqs=32, num_pages=1025),
    "14B at 1M": MODELS["14B"].served(1_010_000, num_layers=2),
}
"""Shapes to time on one device, with two layers, so that indexing of layers is exercised."""
