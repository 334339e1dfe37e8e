"""Sampler: chooses the next token of each row on the device.

Filters and their order are those of transformers: repetition penalty,
temperature, top-k, top-p, min-p. Where several tokens tie at the edge of what
top-k or top-p keeps, all of them stay.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

CANDIDATES = 128
"""Top tokens that filters look at first; if those suffice, the vocabulary is not sorted."""

_Numbers = np.ndarray | jax.Array


class Logprobs(NamedTuple):
    """Log-softmax of logits at a sampled token and at the likeliest ones.

    Attributes:
        sampled: log-probability of the sampled token.
        ids: the K likeliest token ids, in descending order of probability.
        top: log-probabilities of `ids`.
    """

    sampled: Float32[_Numbers, " B"]
    ids: Int[_Numbers, "B K"]
    top: Float32[_Numbers, "B K"]


class Rows(NamedTuple):
    """Sampling settings of a batch, one row per sequence.

    Attributes:
        temperature: 0 for the most likely token.
        top_k: 0 keeps all tokens.
        top_p_complement: probability mass that top-p drops, `1 - top_p`, subtracted in
            float64 as transformers does.
        min_p: least probability kept, as a share of the most likely token's.
        penalty: repetition penalty; 1 for none.
        seed: seed of the sequence's random stream.
        position: index that the new token will have in its sequence; with
            the seed it determines the random numbers.
    """

    temperature: Float[_Numbers, " B"]
    top_k: Int[_Numbers, " B"]
    top_p_complement: Float[_Numbers, " B"]
    min_p: Float[_Numbers, " B"]
    penalty: Float[_Numbers, " B"]
    seed: UInt32[_Numbers, " B"]
    position: Int[_Numbers, " B"]


def sample(
    logits: Float[Array, "B V"],
    rows: Rows,
    seen: Bool[Array, "B V"],
    *,
    vocab_limit: int | None = None,
) -> Int[Array, " B"]:
    """Samples one token id per row (int32), or -1 where the logits are not finite.

    If all rows are greedy and have no penalty, this is one pass over the logits.

    Args:
        seen: tokens that the penalty applies to.
        vocab_limit: exclusive upper bound of the ids that are sampled.
    """
    scores = penalised(logits, rows, seen, vocab_limit=vocab_limit)
    best = scores.max(-1)
    greedy = scores.argmax(-1).astype(jnp.int32)
    token = jax.lax.cond(
        (rows.temperature > 0).any(),
        lambda: jnp.where(rows.temperature > 0, _draw(scores, rows), greedy),
        lambda: greedy,
    )
    return jnp.where(jnp.isfinite(best), token, -1)


def logprobs(logits: Float[Array, "B V"], token: Int[Array, " B"], *, count: int) -> Logprobs:
    """Computes float32 log-probabilities of unfiltered logits.

    Args:
        token: sampled ids, as returned by `sample`; results of rows with -1 are meaningless.
        count: number of likeliest tokens to report; all, if the vocabulary is smaller.
    """
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    top, ids = jax.lax.top_k(scores, min(count, logits.shape[-1]))
    sampled = jnp.take_along_axis(scores, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0]
    return Logprobs(sampled=sampled, ids=ids, top=top)


def penalised(
    logits: Float[Array, "B V"],
    rows: Rows,
    seen: Bool[Array, "B V"],
    *,
    vocab_limit: int | None = None,
) -> Float[Array, "B V"]:
    """Applies the repetition penalty, and sets ids from `vocab_limit` on to -inf."""
    V = logits.shape[-1]
    if vocab_limit is not None and vocab_limit < V:
        logits = jnp.where(jnp.arange(V) < vocab_limit, logits, -jnp.inf)

    def penalise():
        penalty = rows.penalty[:, None]
        changed = jnp.where(logits < 0, logits * penalty, logits / penalty)
        return jnp.where(seen, changed, logits)

    return jax.lax.cond((rows.penalty != 1).any(), penalise, lambda: logits)


def filtered(scores: Float[Array, "B V"], rows: Rows) -> Float[Array, "B V"]:
    """Divides scores by the temperature and sets tokens that top-k, top-p or min-p drop to -inf.

    Rows of temperature 0 are treated as if it were 1.
    """
    V = scores.shape[-1]
    scores = scores / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    num_candidates = min(CANDIDATES, V)
    # Without the barrier XLA slices into the top-k, misses its fast path and sorts.
    candidates = jax.lax.optimization_barrier(jax.lax.top_k(scores, num_candidates)[0])[:, ::-1]
    best_k = (rows.top_k > 0) & (_weakest(candidates, rows.top_k) > candidates[:, 0])
    all_k = rows.top_k == 0
    unfiltered = all_k & (rows.top_p_complement <= 0)
    outside = jnp.zeros_like(rows.top_p_complement)
    if num_candidates < V:
        inside = jnp.exp(candidates - candidates[:, -1:]).sum(-1)
        outside = jnp.where(all_k, jnp.maximum(weights.sum(-1) - inside, 0), outside)
    # Rows whose last kept token is among the candidates, whatever the other rows are.
    decided = (
        (rows.temperature == 0)
        | unfiltered
        | (best_k & (rows.top_k < num_candidates))
        | (all_k & (outside <= rows.top_p_complement * weights.sum(-1)))
    )
    floor = _floor(candidates, outside, rows)
    floor = jax.lax.cond(
        decided.all(),
        lambda: floor,
        lambda: jnp.where(
            decided, floor, _floor(jnp.sort(scores, axis=-1), jnp.zeros_like(outside), rows)
        ),
    )
    floor = jnp.where(unfiltered, -jnp.inf, floor)
    floor = jnp.maximum(floor, scores.max(-1) + jnp.log(rows.min_p))
    return jnp.where(scores >= floor[:, None], scores, -jnp.inf)


def _weakest(ascending: Float[Array, "B C"], top_k: Int[_Numbers, " B"]) -> Float[Array, " B"]:
    """Returns the lowest of the `top_k` highest scores of each row.

    Args:
        ascending: scores sorted in ascending order.
        top_k: 0 for all scores.
    """
    C = ascending.shape[-1]
    place = C - jnp.where(top_k > 0, jnp.minimum(top_k, C), C)
    return jnp.take_along_axis(ascending, place[:, None], axis=-1)[:, 0]


def _floor(
    ascending: Float[Array, "B C"], outside: Float[Array, " B"], rows: Rows
) -> Float[Array, " B"]:
    """Returns the lowest score of each row that top-k and then top-p keep.

    Args:
        ascending: the highest scores, sorted in ascending order.
        outside: total weight of the scores not in `ascending`, relative to the highest score's.
    """
    C = ascending.shape[-1]
    dropped = ascending < _weakest(ascending, rows.top_k)[:, None]
    weights = jnp.where(dropped, 0.0, jnp.exp(ascending - ascending[:, -1:]))
    mass = outside[:, None] + jnp.cumsum(weights, axis=-1)
    tail = rows.top_p_complement[:, None]
    dropped |= (mass <= tail * mass[:, -1:]) & (tail > 0)
    # The best token stays, whatever top_p is.
    dropped &= jnp.arange(C) < C - 1
    return jnp.where(dropped, jnp.inf, ascending).min(-1)


def _draw(scores: Float[Array, "B V"], rows: Rows) -> Int[Array, " B"]:
    scores = filtered(scores, rows)

    def noise(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, scores.shape[-1:], scores.dtype)

    gumbel = jax.vmap(noise)(rows.seed, rows.position)
    # Relative to the best score, so that the noise is not rounded away.
    return (scores - scores.max(-1, keepdims=True) + gumbel).argmax(-1).astype(jnp.int32)
