"""Exact top-k as a mask: static shapes, a budget per row, no sort."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.shard import WHOLE, Shard


def top(
    votes: Float[Array, "N S"],
    budget: Int[Array, " N"],
    *,
    low,
    high,
    end,
    shard: Shard = WHOLE,
) -> Bool[Array, "N S"]:
    """Mask the `budget` largest of the first `end` entries of each row.

    Entries in [low, high) come before all others; of equal ones the first are taken.
    The k-th largest is found by bisection over the bits of a float, which order as the
    floats do where these are not negative.

    Args:
        votes: not negative.
        budget: number of entries to take; all if it exceeds `end`.
        shard: shard that holds these entries; the largest of all shards are taken.
    """
    place = shard.position(jnp.arange(votes.shape[1], dtype=jnp.int32))
    rank = jax.lax.bitcast_convert_type(votes, jnp.int32)
    rank = jnp.where((place >= low) & (place < high), jnp.iinfo(jnp.int32).max, rank)
    rank = jnp.where(place < end, rank, -1)
    budget = jnp.minimum(budget, end)

    def count(chosen):
        return shard.sum(chosen.sum(-1, dtype=jnp.int32))

    def halve(_, bounds):  # at least `budget` entries reach the lower bound
        lower, upper = bounds
        middle = upper - (upper - lower) // 2
        enough = count(rank >= middle[:, None]) >= budget
        return jnp.where(enough, middle, lower), jnp.where(enough, upper, middle - 1)

    lower = jnp.zeros_like(budget)
    upper = jnp.full_like(budget, jnp.iinfo(jnp.int32).max)
    kth, _ = jax.lax.fori_loop(0, 31, halve, (lower, upper))
    above, equal = rank > kth[:, None], rank == kth[:, None]
    wanted = budget - count(above)
    earlier = _before_parts(equal, shard)

    def first_ones():
        upto = jnp.cumsum(equal.reshape(earlier.shape[0], earlier.shape[1], -1), -1)
        return equal & ((earlier[..., None] + upto).reshape(equal.shape) <= wanted[:, None])

    tied = (count(equal) > wanted).any()  # rare, and the sums are dear
    return above | jax.lax.cond(tied, first_ones, lambda: equal)


def _before_parts(chosen: Bool[Array, "N S"], shard: Shard) -> Int[Array, "N parts"]:
    """Number chosen at positions before each local part of a page, over all shards."""
    if shard.count == 1:
        return jnp.zeros((len(chosen), 1), jnp.int32)
    of_part = chosen.reshape(len(chosen), -1, shard.part).sum(-1, dtype=jnp.int32)
    parts = jax.lax.all_gather(of_part, shard.axis, axis=2)
    flat = parts.reshape(len(chosen), -1)
    before = (jnp.cumsum(flat, -1) - flat).reshape(parts.shape)
    return jax.lax.dynamic_index_in_dim(before, shard.index, 2, False)
