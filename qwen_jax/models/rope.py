"""Rotary position embeddings: angles computed on the host, rotated views of queries.

Angles near 1e5 radians need float32 products rounded as PyTorch rounds them, since the
weights were trained on those, and no on-device sine. So a table of every rotary position
is built once in numpy and indexed by position modulo the chunk length.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen_jax.config import ModelConfig, Yarn


class Rotary(NamedTuple):
    """Cosine and sine of each rotary position (rows) and pair of dimensions (columns)."""

    cos: Float[Array, "*B pairs"]
    sin: Float[Array, "*B pairs"]


class Table(NamedTuple):
    """Cosines and sines of every rotary position, concatenated along the last axis.

    Together they fill the lanes of a TPU, which would otherwise pad each of them.
    """

    rows: Float[Array, "positions H"]

    def at(self, positions: Int[Array, "*B"]) -> Rotary:
        """Gathers the rotations of positions, which are clipped to the table."""
        rows = jnp.take(self.rows, positions, axis=0, mode="clip")
        return Rotary(*jnp.split(rows, 2, axis=-1))


def table(config: ModelConfig, max_len: int) -> Table:
    """Builds the float32 table of all rotary positions of sequences of up to `max_len` tokens."""
    rows = max_len
    geometry = config.dual_chunk
    if geometry is not None and max_len > geometry.chunk_len:
        rows = geometry.chunk_size + 1
    exponent = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
    power = np.float64(config.rope_theta) ** exponent.astype(np.float64)
    frequency = np.float32(1) / power.astype(np.float32)
    scale = np.float32(1)
    if config.yarn is not None:
        frequency = _stretched(config, config.yarn, power.astype(np.float32))
        scale = np.float32(config.yarn.attention_factor)
    angle = np.arange(rows, dtype=np.float32)[:, None] * frequency
    return Table(jnp.asarray(np.concatenate([np.cos(angle), np.sin(angle)], axis=1) * scale))


def _stretched(config: ModelConfig, yarn: Yarn, power: np.ndarray) -> np.ndarray:
    """Computes the frequencies of YaRN: low ones divided by its factor, high ones unchanged.

    Args:
        power: inverse frequencies without YaRN, float32 [pairs].
    """

    def dimension(turns: float) -> float:
        """Returns the (fractional) pair of dimensions of `turns` turns in the training length."""
        wavelength = yarn.original_len / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    width = high - low or 0.001
    ramp = (np.arange(len(power), dtype=np.float32) - np.float32(low)) / np.float32(width)
    kept = np.float32(1) - ramp.clip(0, 1)
    one, factor = np.float32(1), np.float32(yarn.factor)
    return one / (factor * power) * (one - kept) + one / power * kept


def rotate(x: Float[Array, "*#B heads H"], rotary: Rotary) -> Float[Array, "... heads H"]:
    """Rotates each row of `x` by its angles, in float32 (arXiv:2104.09864, half-split pairs)."""
    cos, sin = rotary.cos[..., None, :], rotary.sin[..., None, :]
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


class Angles(NamedTuple):
    """Rotations of the tokens of one step, gathered once for all layers."""

    query: Rotary  # rows [views, T]
    key: Rotary  # rows [T]


def angles(config: ModelConfig, rotary: Table, positions: Int[Array, " T"]) -> Angles:
    """Gathers the rotations of the tokens at absolute `positions`, as queries and as keys."""
    geometry = config.dual_chunk
    if geometry is None:
        return Angles(query=rotary.at(positions[None]), key=rotary.at(positions))
    return Angles(
        query=rotary.at(jnp.stack(geometry.query_positions(positions))),
        key=rotary.at(geometry.key_position(positions)),
    )


def selection_angles(config: ModelConfig, rotary: Table, positions: Int[Array, " R"]) -> Rotary:
    """Computes the rotations, rows [views, R], of queries that vote in sparse selection.

    Their angles lie beyond the table, so each is the sum of two angles in it.
    """
    geometry = config.dual_chunk
    if geometry is None:
        return rotary.at(positions[None])
    near = rotary.at(geometry.key_position(positions))
    far = rotary.at(jnp.asarray(geometry.critical_offsets)[:, None])
    return Rotary(
        cos=near.cos * far.cos - near.sin * far.sin, sin=near.sin * far.cos + near.cos * far.sin
    )


def rotate_views(
    x: Float[Array, "T N H"], query: Rotary, scale: jax.Array
) -> Float[Array, "V T N H"]:
    """Rotates the queries once per view and multiplies by `scale`, [] or [T], before rounding."""
    scale = jnp.broadcast_to(scale, x.shape[:1])[:, None, None]
    return (rotate(x[None], query) * scale).astype(x.dtype)
