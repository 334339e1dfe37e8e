"""Softmax in pieces: running (m, l, acc) and the merge of two (out, lse); empty = -inf.

`m` is the running maximum of the logits, `l` the sum of `exp(logit - m)`, `acc` the
unnormalised output, as in flash attention (arXiv:2205.14135). `lse` is the natural
logarithm of the sum of exponentials, in float32.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

MASKED = -1e30  # finite: -inf - -inf is nan


def start(shape: tuple[int, ...], head_dim: int):
    """The state (m, l, acc) of rows that have seen no key."""
    m = jnp.full(shape, MASKED, jnp.float32)
    return m, jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, head_dim), jnp.float32)


def update(state, scores: Float[Array, "J M S"], values: Float[Array, "J S H"]):
    """The state after S more keys; masked scores hold `MASKED`."""
    m, l, acc = state
    m_new = jnp.maximum(m, scores.max(-1))
    p = jnp.exp(scores - m_new[..., None])
    decay = jnp.exp(m - m_new)
    l = decay * l + p.sum(-1)
    added = jnp.einsum(
        "JMS,JSH->JMH", p.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return m_new, l, decay[..., None] * acc + added


def finish(state) -> tuple[Float[Array, "*B H"], Float[Array, "*B"]]:
    """Output and log-sum-exp; a row that has seen no key gets 0 and -inf."""
    m, l, acc = state
    seen = m > MASKED
    out = jnp.where(seen[..., None], acc / jnp.where(seen, l, 1.0)[..., None], 0.0)
    return out, jnp.where(seen, m + jnp.log(jnp.where(seen, l, 1.0)), -jnp.inf)


def merge(
    out_a: Float[Array, "*B H"],
    lse_a: Float[Array, "*B"],
    out_b: Float[Array, "*B H"],
    lse_b: Float[Array, "*B"],
) -> tuple[Float[Array, "*B H"], Float[Array, "*B"]]:
    """Merge attention over two disjoint sets of keys (arXiv:2501.15383, section 5)."""
    m = jnp.maximum(lse_a, lse_b)
    shift = jnp.where(jnp.isfinite(m), m, 0.0)
    a, b = jnp.exp(lse_a - shift), jnp.exp(lse_b - shift)
    total = a + b
    safe = jnp.where(total > 0, total, 1.0)
    out = (a[..., None] * out_a + b[..., None] * out_b) / safe[..., None]
    return out, jnp.where(total > 0, shift + jnp.log(safe), -jnp.inf)
