"""Rotation, cache and attention together, against the definition of DCA pair by pair."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.random_models import smallest

from pallas_kernels.decode import decode
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.prefill import prefill
from qwen_jax.models import kv_cache, rope

CONFIG = smallest(num_heads=4, num_kv_heads=2, head_dim=16, max_len=160)
SLICE, PAGE = 24, 8


def relative_position(i, j, chunk_size, local_size):
    """Distance at which query i sees key j (arXiv:2402.17463, section 3)."""
    chunk = chunk_size - local_size
    behind = i // chunk - j // chunk
    if behind == 0:
        return i - j
    query = min(i % chunk + chunk, chunk_size) if behind == 1 else min(2 * chunk - 1, chunk_size)
    return query - j % chunk


def turned(x, position, theta):
    """`x` rotated to one position, in float64."""
    half = len(x) // 2
    angle = position * theta ** (-np.arange(half) / half)
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag])


def brute_force(queries, keys, values, geometry, scale):
    """Causal attention in float64; query i meets key j rotated by their relative position."""
    S, N, H = queries.shape
    group = N // keys.shape[1]
    out = np.zeros((S, N, H))
    for i in range(S):
        distance = [
            relative_position(i, j, geometry.chunk_size, geometry.local_size) for j in range(i + 1)
        ]
        for n in range(N):
            of = {d: turned(queries[i, n], d, CONFIG.rope_theta) for d in set(distance)}
            scores = np.array([of[d] @ keys[j, n // group] for j, d in enumerate(distance)]) * scale
            weights = np.exp(scores - scores.max())
            out[i, n] = weights @ values[: i + 1, n // group] / weights.sum()
    return out


def draw(seed):
    """Sizes of chunks, a length of up to four of them, and cuts of it into slices."""
    rng = np.random.default_rng(seed)
    chunk_size = int(rng.integers(4, 49))
    geometry = ChunkGeometry(chunk_size, int(rng.integers(1, chunk_size)))
    length = int(rng.integers(1, min(4 * geometry.chunk_len, CONFIG.max_len) + 1))
    cuts = [0]
    while cuts[-1] < length:
        cuts.append(min(cuts[-1] + int(rng.integers(1, SLICE + 1)), length))
    return rng, geometry, length, cuts


@pytest.mark.parametrize("seed", range(24))
def test_any_slicing_of_any_geometry_equals_the_brute_force(seed):
    rng, geometry, length, cuts = draw(seed)
    config = dataclasses.replace(CONFIG, dual_chunk=geometry)
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    x = rng.standard_normal((length, N + 2 * K, H)).astype(np.float32)
    scale = float(rng.uniform(0.2, 1.0))
    expected = brute_force(*np.split(x.astype(np.float64), [N, N + K], axis=1), geometry, scale)
    rotary = rope.table(config, config.max_len)
    table = jnp.asarray(1 + rng.permutation(config.max_len // PAGE), jnp.int32)

    def rotated(tokens, positions):
        angles = rope.angles(config, rotary, positions)
        queries = rope.rotate_views(tokens[:, :N], angles.query, jnp.float32(scale))
        key = rope.Rotary(*(part[None] for part in angles.key))
        keys = rope.rotate_views(tokens[:, N : N + K], key, jnp.float32(1))[0]
        return queries, keys, tokens[:, N + K :]

    @jax.jit
    def run_slice(cache, tokens, start, size):
        positions = start + jnp.arange(SLICE, dtype=jnp.int32)
        queries, keys, values = rotated(tokens, positions)
        cache = kv_cache.write_slice(cache, jnp.int32(0), keys, values, table, start, size)
        args = (cache, jnp.int32(0), table, start, size)
        return prefill(queries, *args, geometry=geometry)[0], cache

    @jax.jit
    def run_token(cache, tokens, positions):
        queries, keys, values = rotated(tokens, positions)
        cache = kv_cache.write_tokens(cache, jnp.int32(0), keys, values, table[None], positions)
        args = (cache, jnp.int32(0), table[None], positions[None])
        return decode(queries[:, None], *args, geometry=geometry)[0][0], cache

    cache = kv_cache.init(config, config.max_len // PAGE + 1, PAGE, jnp.float32)
    for start, stop in itertools.pairwise(cuts):
        tokens = np.zeros((SLICE, *x.shape[1:]), np.float32)
        tokens[: stop - start] = x[start:stop]
        out, cache = run_slice(cache, tokens, jnp.int32(start), jnp.int32(stop - start))
        assert np.abs(out[: stop - start] - expected[start:stop]).max() <= 1e-5
    # The second half again, token by token, as if it were an answer.
    for position in range(length // 2, length):
        positions = jnp.full((1,), position, jnp.int32)
        out, cache = run_token(cache, jnp.asarray(x[position : position + 1]), positions)
        assert np.abs(out[0] - expected[position]).max() <= 1e-5
