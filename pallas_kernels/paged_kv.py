"""Paged key and value cache: the one pytree that attention operations read and steps write."""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys and values of all layers, in pages that a page table orders into sequences.

    Key s of a sequence lies in page `page_table[s // page]`, row `s % page`; on a mesh each page
    is cut along its rows (`shard.Shard`). Layers come first, so that a layer is read in place.

    Attributes:
        keys: keys rotated to `ChunkGeometry.key_position`, unscaled, in any floating dtype.
        values: values in the same shape; most kernels also need the same dtype.
    """

    keys: Float[Array, "L K pages page H"]
    values: Float[Array, "L K pages page H"]

    @property
    def page(self) -> int:
        """Rows of a page in these arrays: its tokens, or a shard's part of them."""
        return self.keys.shape[3]
