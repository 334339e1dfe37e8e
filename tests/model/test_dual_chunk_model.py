"""The engine with Dual Chunk Attention against the float64 definition of the whole model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import definition, random_models

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.request import Request

CASES = {
    "no chunks": (None, 0),
    "chunks of 32": (ChunkGeometry(chunk_size=48, local_size=16), 0),
    "chunks of 32, temperature": (ChunkGeometry(chunk_size=48, local_size=16), 40),
    "overlap longer than a chunk": (ChunkGeometry(chunk_size=40, local_size=24), 0),
    "odd sizes, temperature": (ChunkGeometry(chunk_size=45, local_size=10), 1),
}
SLICE = 32
STEPS = 12


def geometry_lengths(geometry):
    """Lengths from one token to four chunks and a bit, on both sides of every border."""
    if geometry is None:
        return (1, 33, 100)
    chunk = geometry.chunk_size - geometry.local_size
    size = geometry.chunk_size
    return (1, chunk, chunk + 1, size + 1, size + 2, 2 * chunk + 1, 3 * chunk - 1, 4 * chunk + 3)


def factors(config, *, vllm_parity):
    """The temperature of every position, when the first `prompt_len` came as a prompt."""

    def of(prompt_len, length):
        decoded = [config.temperature(n) for n in range(prompt_len + 1, length + 1)]
        s = np.array([config.temperature(prompt_len)] * prompt_len + decoded)
        return (s, s) if vllm_parity else (s**2, 1.0)

    return of


@functools.cache
def model(name, *, vllm_parity=False):
    """A configuration, its weights (the same in every case) and its engine."""
    geometry, original_len = CASES[name]
    config = random_models.config(3, dual_chunk=geometry, original_len=original_len)
    weights = random_models.weights(config)
    tree = jax.tree.map(jnp.asarray, weights)
    limits = EngineConfig(max_len=200, slices=(SLICE,), vllm_parity=vllm_parity)
    return config, weights, Engine(config, tree, limits)


def score(engine, tokens):
    return np.concatenate(list(engine.score(tokens)))


def answer(engine, prompt, steps):
    return engine.run([Request(prompt=prompt, max_new_tokens=steps)])[0]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_definition_for_one_to_four_chunks(name):
    config, weights, engine = model(name)
    for length in geometry_lengths(config.dual_chunk):
        tokens = random_models.tokens(config, length)
        scales = factors(config, vllm_parity=False)(length, length)
        expected = definition.logits(config, weights, tokens, *scales)
        assert np.abs(score(engine, tokens) - expected).max() <= 1e-4


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if original_len else pytest.mark.long)
        for name, (_, original_len) in CASES.items()
    ],
)
def test_a_greedy_answer_equals_the_definition_across_a_border(name):
    config, _, _ = model(name)
    assert_answers_equal(name, geometry_lengths(config.dual_chunk)[-2], vllm_parity=False)


@pytest.mark.parametrize(
    "name", [name for name, (_, original_len) in CASES.items() if original_len]
)
def test_vllm_parity_scales_cached_keys_by_the_length_at_their_time(name):
    assert_answers_equal(name, 100, vllm_parity=True)


def assert_answers_equal(name, length, *, vllm_parity):
    """By induction: each token of the answer is the most likely one after those before it."""
    config, weights, engine = model(name, vllm_parity=vllm_parity)
    for seed in range(100):
        prompt = random_models.tokens(config, length, seed)
        tokens = (*prompt, *answer(engine, prompt, STEPS))
        scales = factors(config, vllm_parity=vllm_parity)(length, len(tokens))
        expected = definition.logits(config, weights, tokens, *scales)[length - 1 : -1]
        second, best = np.partition(expected, (-2, -1))[:, -2:].T
        if (best - second).min() > 1e-3:  # no near tie, which rounding alone could turn
            assert tokens[length:] == tuple(expected.argmax(-1).tolist())
            return
    pytest.fail("every prompt has a near tie")


@pytest.mark.parametrize("name", ["chunks of 32", "overlap longer than a chunk"])
def test_chunks_change_nothing_until_a_distance_is_cut_off(name):
    config, _, chunked = model(name)
    _, _, plain = model("no chunks")
    geometry = config.dual_chunk
    tokens = random_models.tokens(config, 2 * geometry.chunk_size)
    difference = np.abs(score(chunked, tokens) - score(plain, tokens)).max(-1)
    first = min(geometry.chunk_size + 1, 2 * geometry.chunk_len)
    assert difference[:first].max() <= 1e-5
    assert difference[first] > 1e-3
