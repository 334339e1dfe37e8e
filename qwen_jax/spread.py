"""Attention on the devices of a mesh: what each has of a step, and how their results meet.

A device holds some heads (`tensor`) and of every page a part (`seq`). Keys stay where they
are: the queries of a slice are gathered along `seq`, every device attends to its own keys, and
what they found is merged by its log-sum-exp and scattered. All else is the compiler's, by the
placements of weights and tokens. Without a mesh nothing of this happens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.shard import WHOLE, Shard
from qwen_jax.cache import AXES, Cache
from qwen_jax.sharding import RULES

_SEQ = "seq"


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
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

    def merge(self, out: Float[Array, "T N H"], lse: Float[Array, "T N"]) -> Float[Array, "t N H"]:
        """Attention over the keys of all shards, of this device's tokens.

        Few tokens that all devices have are merged by one collective.
        """
        if self.shard.count == 1:
            return out
        wide = out.astype(jnp.float32)
        if self.split:
            weight = _weights(lse, self.shard.merge_lse(lse))
            merged = jax.lax.psum_scatter(weight[..., None] * wide, _SEQ, tiled=True)
        else:
            both = jax.lax.all_gather(jnp.concatenate([wide, lse[..., None]], -1), _SEQ)
            weight = _weights(both[..., -1], jax.nn.logsumexp(both[..., -1], axis=0))
            merged = (weight[..., None] * both[..., :-1]).sum(0)
        return merged.astype(out.dtype)


def _weights(lse: Float[Array, "*B"], total: Float[Array, "*#B"]) -> Float[Array, "*B"]:
    """The share that a set of keys has of a softmax over more keys; of none at all, 0."""
    return jnp.exp(lse - jnp.where(jnp.isfinite(total), total, 0))


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
    body: Callable[..., tuple[Cache, Any, Any]],
    cache: Cache,
    rows: tuple[Float[Array, "T _ H"], ...],
    rest: Any,
    per_head: tuple[Array, ...] = (),
    *,
    split: bool,
) -> tuple[Cache, Any, Any]:
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
        return body(Part(WHOLE, False), cache, rows, rest, per_head)
    of_rows = PartitionSpec(_SEQ if split else None, RULES.heads)
    of_heads, of_cache = PartitionSpec(RULES.heads), RULES.spec(AXES)

    def local(cache, rows, rest, per_head):
        index = jax.lax.axis_index(_SEQ)
        shard = Shard(index, cache.page, mesh.shape[_SEQ], _SEQ)
        return body(Part(shard, split), cache, rows, rest, per_head)

    return jax.shard_map(
        local,
        in_specs=(of_cache, of_rows, PartitionSpec(), of_heads),
        out_specs=(of_cache, of_rows, of_heads),
        check_vma=False,
    )(cache, rows, rest, per_head)
