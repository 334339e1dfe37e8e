"""Attention on the devices of a mesh: what each has of a step, and how their results meet.

A device holds some heads (`tensor`) and of every page a part (`seq`). Keys stay where they
are: the queries of a slice are gathered along `seq`, every device attends to its own keys, and
what they found goes back to where the queries came from, to be merged by its log-sum-exp. All
else is the compiler's, by the placements of weights and tokens. Without a mesh nothing of this
happens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.shard import WHOLE, Shard
from qwen_jax.distributed.sharding import RULES
from qwen_jax.models.kv_cache import AXES

_SEQ = "seq"


@dataclasses.dataclass(frozen=True, slots=True)
class LocalShard:
    """What a device has of a step, inside `run`.

    Attributes:
        shard: of the cache.
        split: whether it has its own tokens only, else all.
    """

    shard: Shard
    split: bool

    def all_tokens(self, x: Float[Array, "t heads H"]) -> Float[Array, "T heads H"]:
        """Those of all devices along `seq`."""
        return jax.lax.all_gather(x, _SEQ, tiled=True) if self.split else x

    def scatter(self, x: Float[Array, "T heads H"]) -> Float[Array, "t heads H"]:
        """Of tokens that one shard each has, where the others have 0, those of this device.

        Bits are summed, not numbers, so that the sign of a zero stays.
        """
        if self.shard.count == 1:
            return x
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        if self.split:
            bits = jax.lax.psum_scatter(bits, _SEQ, tiled=True)
        else:
            bits = jax.lax.psum(bits, _SEQ)
        return jax.lax.bitcast_convert_type(bits, x.dtype)

    def merge(self, out: Float[Array, "T N H"], lse: Float[Array, "T N"]) -> Float[Array, "t N H"]:
        """Attention over the keys of all shards, of this device's tokens.

        Every device sends the others what it found for their tokens, as it is: a sum on the way
        would have to be sent in float32. Few tokens that all devices have are merged by one
        collective.
        """
        if self.shard.count == 1:
            return out
        if self.split:
            parts, lses = map(self._to_owners, (out, lse))
        else:
            wide = out.astype(jnp.float32)
            both = jax.lax.all_gather(jnp.concatenate([wide, lse[..., None]], -1), _SEQ)
            parts, lses = both[..., :-1], both[..., -1]
        total = jax.nn.logsumexp(lses, axis=0)
        # Of a token that no shard has keys for, all are 0.
        weight = jnp.exp(lses - jnp.where(jnp.isfinite(total), total, 0))
        return (weight[..., None] * parts.astype(jnp.float32)).sum(0).astype(out.dtype)

    def _to_owners(self, x: Shaped[Array, "T *B"]) -> Shaped[Array, "shards t *B"]:
        """Of this device's tokens, what every shard found."""
        dealt = x.reshape(self.shard.count, -1, *x.shape[1:])
        return jax.lax.all_to_all(dealt, _SEQ, 0, 0)


ALONE = LocalShard(WHOLE, split=False)
"""Of a device that has all there is."""


def splits(tokens: int) -> bool:
    """Whether the tokens of a slice are divided along `seq`: if they can be."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape[_SEQ] > 1 and tokens % mesh.shape[_SEQ] == 0


def place(x: Float[Array, "T D"], *, split: bool) -> Float[Array, "T D"]:
    """`x` with its tokens divided along `seq`, or the same on all devices."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(_SEQ if split else None))


def row(x: Float[Array, "T D"], index) -> Float[Array, "1 D"]:
    """One token, the same on all devices."""
    if jax.sharding.get_abstract_mesh().empty:
        return jax.lax.dynamic_slice_in_dim(x, index, 1)
    # A sum, because the compiler would gather all tokens for a slice.
    mine = (jnp.arange(len(x)) == index)[:, None]
    return place(jnp.where(mine, x, 0).sum(0, keepdims=True), split=False)


def run(
    body: Callable[..., tuple[PagedKV, Any, Any]],
    cache: PagedKV,
    rows: tuple[Float[Array, "T _ H"], ...],
    rest: Any,
    per_head: tuple[Array, ...] = (),
    *,
    split: bool,
) -> tuple[PagedKV, Any, Any]:
    """`body(part, cache, rows, rest, per_head)` on each device, of what it holds of these arrays.

    Args:
        body: returns the cache, arrays like `rows` and arrays like `per_head`. It may not
            close over arrays.
        rows: of every token and head.
        rest: arrays that are the same on all devices.
        per_head: arrays [N].
        split: whether tokens are divided along `seq`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return body(ALONE, cache, rows, rest, per_head)
    of_rows = PartitionSpec(_SEQ if split else None, RULES.heads)
    of_heads, of_cache = PartitionSpec(RULES.heads), RULES.spec(AXES)

    def local(cache, rows, rest, per_head):
        index = jax.lax.axis_index(_SEQ)
        shard = Shard(index, cache.page, mesh.shape[_SEQ], _SEQ)
        return body(LocalShard(shard, split), cache, rows, rest, per_head)

    return jax.shard_map(
        local,
        in_specs=(of_cache, of_rows, PartitionSpec(), of_heads),
        out_specs=(of_cache, of_rows, of_heads),
        check_vma=False,
    )(cache, rows, rest, per_head)
