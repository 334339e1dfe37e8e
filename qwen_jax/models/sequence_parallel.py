"""Sequence-parallel attention on a mesh: each device's part of a step, and the collectives.

A device holds some heads (`tensor`) and a part of every page (`seq`). Keys are not moved:
the queries of a slice are gathered along `seq`, every device attends to its own keys, and
the partial outputs return to the devices of their queries, to be merged by their log-sum-exp.
Other collectives are inserted by the compiler, from the shardings of weights and tokens. Without
a mesh there are no collectives.
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
    """Part of a step that a device holds, inside `run`.

    Attributes:
        shard: part of each page of the cache.
        split: True if tokens are divided along `seq`, False if every device holds all.
    """

    shard: Shard
    split: bool

    def all_tokens(self, x: Float[Array, "t heads H"]) -> Float[Array, "T heads H"]:
        """Gathers the tokens of all devices along `seq`, if they are divided."""
        return jax.lax.all_gather(x, _SEQ, tiled=True) if self.split else x

    def scatter(self, x: Float[Array, "T heads H"]) -> Float[Array, "t heads H"]:
        """Reduce-scatters tokens that exactly one shard holds, where the others have 0.

        Without `split` every device gets all tokens. Bits are summed as integers, which keeps
        the sign of a zero.
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
        """Merges attention over the keys of each shard into attention over all keys.

        With `split`, every device sends the others its partial outputs for their tokens in their
        own dtype (all-to-all); a reduction on the way would need float32. Otherwise the tokens,
        few and the same on all devices, are merged by one all-gather.

        Args:
            out: attention output of all tokens over the keys of this shard.
            lse: log-sum-exp of the same, float32.

        Returns:
            Output of this device's tokens, in the dtype of `out`.
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
        """Sends each token's partial result to its device; returns those of every shard."""
        dealt = x.reshape(self.shard.count, -1, *x.shape[1:])
        return jax.lax.all_to_all(dealt, _SEQ, 0, 0)


ALONE = LocalShard(WHOLE, split=False)
"""Part of a device that holds everything: no mesh."""


def splits(tokens: int) -> bool:
    """Returns True if a slice of `tokens` tokens is divided along `seq` of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape[_SEQ] > 1 and tokens % mesh.shape[_SEQ] == 0


def place(x: Float[Array, "T D"], *, split: bool) -> Float[Array, "T D"]:
    """Constrains the sharding of `x`: tokens divided along `seq`, or replicated."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(_SEQ if split else None))


def row(x: Float[Array, "T D"], index) -> Float[Array, "1 D"]:
    """Selects one token of `x`, replicated on all devices."""
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
    """Runs `body(part, cache, rows, rest, per_head)` on each device, with its parts of the arrays.

    Args:
        body: returns the cache, arrays like `rows` and arrays like `per_head`. It may not
            close over arrays.
        rows: arrays with a row for every token and head, sharded along `tensor` and, if `split`,
            along `seq`.
        rest: arrays that are replicated on all devices.
        per_head: arrays [N], sharded along `tensor`.
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
