"""Shard: the part of every page that lies on this device, where a mesh axis shares pages out.

Each page of a sequence is cut into as many parts as the axis has devices, and each device
holds one part of all pages. So consecutive parts are dealt round-robin, and whatever is read of
a sequence, causal or sparse, every device holds about as much of it as the others. A device's
own keys lie one after another; an index among them is called *local*, and grows with the
position.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["index"], meta_fields=["part", "count", "axis"]
)
@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` shards of a paged cache; operations get its arrays alone.

    Attributes:
        index: which one, from 0.
        part: keys of each page that lie here.
        count: shards in all; 1 where pages lie here whole.
        axis: mesh axis along which the others lie, inside `shard_map`.
    """

    index: Array | int = 0
    part: int = 1
    count: int = 1
    axis: str | None = None

    def position(self, local):
        """Position in the sequence of a local key."""
        if self.count == 1:
            return local
        page = local // self.part
        return (page * (self.count - 1) + self.index) * self.part + local

    def before(self, position):
        """Number of local keys before a position: the first local key from it on."""
        if self.count == 1:
            return position
        page = position // (self.part * self.count)
        rest = position - (page * self.count + self.index) * self.part
        return page * self.part + rest.clip(0, self.part)

    def upto(self, position):
        """The last local key up to a position, -1 where there is none."""
        return position if self.count == 1 else self.before(position + 1) - 1

    def scalars(self) -> list[Array | int]:
        """Return what a kernel takes as scalars; the rest is static."""
        return [] if self.count == 1 else [self.index]

    def inside(self, scalars_ref, first: int) -> "Shard":
        """Rebuild the shard in a kernel whose scalars from `first` on are `scalars()`."""
        return self if self.count == 1 else dataclasses.replace(self, index=scalars_ref[first])

    def sum(self, x: Shaped[Array, "*B"]) -> Shaped[Array, "*B"]:
        """Sum over all shards."""
        return x if self.count == 1 else jax.lax.psum(x, self.axis)

    def gather(self, x: Shaped[Array, "N S"]) -> Shaped[Array, "N *all"]:
        """Gather values of all shards' keys, ordered by position."""
        if self.count == 1:
            return x
        parts = jax.lax.all_gather(x.reshape(len(x), -1, self.part), self.axis, axis=2)
        return parts.reshape(len(x), -1)

    def own(self, x: Shaped[Array, "N all"], unit: int) -> Shaped[Array, "N S"]:
        """Slice the local part out of values by position, one for each `unit` keys."""
        if self.count == 1:
            return x
        parts = x.reshape(len(x), -1, self.count, self.part // unit)
        return jax.lax.dynamic_index_in_dim(parts, self.index, 2, False).reshape(len(x), -1)

    def shift_overflow(
        self, over: Shaped[Array, "N pages R"], size: int
    ) -> Shaped[Array, "N pages size"]:
        """Shift sums that reach R places past each part into the parts after it.

        Args:
            size: keys of a part, or of a page that lies here whole.
        """
        N, pages, R = over.shape
        found = jnp.zeros((N, pages, size), over.dtype)
        for hop in range(1, -(-R // size) + 1):
            moved = over[..., (hop - 1) * size : hop * size]
            if self.count > 1:
                ring = [(i, (i + hop) % self.count) for i in range(self.count)]
                moved = jax.lax.ppermute(moved, self.axis, ring)
            # The part before the first one of a page is the last one of the page before it.
            most = -(-hop // self.count)
            back = -((self.index - hop) // self.count)
            moved = jnp.pad(moved, ((0, 0), (most, 0), (0, 0)))
            moved = jax.lax.dynamic_slice_in_dim(moved, most - back, pages, 1)
            found = found.at[..., : moved.shape[2]].add(moved)
        return found

    def merge_lse(self, lse: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Merge log-sum-exps over the keys of all shards."""
        if self.count == 1:
            return lse
        return jax.nn.logsumexp(jax.lax.all_gather(lse, self.axis), axis=0)


WHOLE = Shard()
"""The only shard of a cache that lies on one device."""
