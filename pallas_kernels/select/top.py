"""Exact top-k as a mask: static shapes, a budget per row, no sort."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def top(
    votes: Float[Array, "N S"], budget: Int[Array, " N"], *, low, high, end
) -> Bool[Array, "N S"]:
    """Which of the first `end` entries of a row are its `budget` largest.

    Entries in [low, high) come before all others; of equal ones the first are taken.
    The k-th largest is found by bisection over the bits of a float, which order as the
    floats do where these are not negative.

    Args:
        votes: not negative.
        budget: how many to take; beyond `end`, all.
    """
    S = votes.shape[1]
    place = jnp.arange(S, dtype=jnp.int32)
    rank = jax.lax.bitcast_convert_type(votes, jnp.int32)
    rank = jnp.where((place >= low) & (place < high), jnp.iinfo(jnp.int32).max, rank)
    rank = jnp.where(place < end, rank, -1)
    budget = jnp.minimum(budget, end)

    def halve(_, bounds):  # at least `budget` entries reach the lower bound
        lower, upper = bounds
        middle = upper - (upper - lower) // 2
        enough = (rank >= middle[:, None]).sum(-1) >= budget
        return jnp.where(enough, middle, lower), jnp.where(enough, upper, middle - 1)

    lower = jnp.zeros_like(budget)
    upper = jnp.full_like(budget, jnp.iinfo(jnp.int32).max)
    kth, _ = jax.lax.fori_loop(0, 31, halve, (lower, upper))
    above, equal = rank > kth[:, None], rank == kth[:, None]
    wanted = budget - above.sum(-1)

    def first_ones():
        return equal & (jnp.cumsum(equal, -1) <= wanted[:, None])

    tied = (equal.sum(-1) > wanted).any()  # rare, and the sums are dear
    return above | jax.lax.cond(tied, first_ones, lambda: equal)
