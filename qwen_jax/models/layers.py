"""Layers without sequence state: Projection, RMSNorm, GatedMLP, Embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen_jax.config import ModelConfig


class Projection(nnx.Module):
    """`einsum(equation, x, kernel) + bias`: every matrix product of the model.

    Keyword arguments name the axes of the kernel, in order, with their sizes:

        Projection("...D,DF->...F", embed=3584, mlp=18944, rngs=rngs, dtype=jnp.bfloat16)

    Args:
        equation: einsum of the input with the kernel.
        bias: names of the trailing kernel axes that a bias spans; empty for none.
    """

    def __init__(
        self, equation: str, *, rngs: nnx.Rngs, dtype, bias: tuple[str, ...] = (), **axes: int
    ):
        kernel = 0.02 * jax.random.normal(rngs.params(), tuple(axes.values()), dtype)
        self.kernel = nnx.Param(kernel, axes=tuple(axes))
        if bias:
            shape = tuple(axes[axis] for axis in bias)
            self.bias = nnx.Param(
                0.02 * jax.random.normal(rngs.params(), shape, dtype), axes=tuple(bias)
            )
        self.has_bias = bool(bias)
        self.equation = equation

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if not self.has_bias:
            # Rounded where it is made, so that a mesh adds up half the bytes.
            return jnp.einsum(self.equation, x, self.kernel[...], preferred_element_type=x.dtype)
        y = jnp.einsum(self.equation, x, self.kernel[...], preferred_element_type=jnp.float32)
        return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + eps)`, the mean in float32 (arXiv:1910.07467).

    Args:
        axis: what the normalized axis, the last one, means.
    """

    def __init__(self, dim: int, *, eps: float, dtype, axis: str = "embed"):
        self.scale = nnx.Param(jnp.ones((dim,), dtype), axes=(axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return self.scale[...] * normed.astype(x.dtype)


class GatedMLP(nnx.Module):
    """SwiGLU feed-forward block: `down(silu(gate(x)) * up(x))` (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        D, F = config.embed_dim, config.mlp_dim
        self.gate = Projection("...D,DF->...F", embed=D, mlp=F, rngs=rngs, dtype=dtype)
        self.up = Projection("...D,DF->...F", embed=D, mlp=F, rngs=rngs, dtype=dtype)
        self.down = Projection("...F,FD->...D", mlp=F, embed=D, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Embedding(nnx.Module):
    """Token embedding [V, D]; `logits` multiplies by its transpose, as a tied output head."""

    def __init__(self, vocab_size: int, dim: int, *, rngs: nnx.Rngs, dtype):
        table = 0.02 * jax.random.normal(rngs.params(), (vocab_size, dim), dtype)
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return self.embedding[...][tokens]

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Computes the float32 logits of every token of the vocabulary."""
        return jnp.einsum(
            "...D,VD->...V", x, self.embedding[...], preferred_element_type=jnp.float32
        )
