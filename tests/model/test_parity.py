"""The engine's logits and greedy answers against PyTorch's, on the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from support import demo_checkpoint, huggingface, random_models
from transformers import Qwen2ForCausalLM

from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.request import Request

pytestmark = pytest.mark.torch

SLICE = 64
LENGTHS = (1, 2, SLICE - 1, SLICE, SLICE + 1, 3 * SLICE + 8)
STEPS = 64
PROMPT = 40


def make_engine(config, weights, dtype=jnp.float32):
    tree = jax.tree.map(lambda array: jnp.asarray(array, dtype), weights)
    return Engine(config, tree, EngineConfig(max_len=4 * SLICE, slices=(SLICE,)))


def score(engine, tokens):
    return np.concatenate(list(engine.score(tokens)))


def answer(engine, prompt, steps):
    return engine.run([Request(prompt=prompt, max_new_tokens=steps)])[0]


@functools.cache
def model(name):
    """A configuration, its weights, its PyTorch model and its engine."""
    config = random_models.CONFIGS[name]
    weights = random_models.weights(config)
    return config, weights, huggingface.build(config, weights), make_engine(config, weights)


@pytest.mark.parametrize("name", random_models.CONFIGS)
def test_logits_equal_pytorch_at_any_length(name):
    config, _, reference, engine = model(name)
    for length in LENGTHS:
        tokens = random_models.tokens(config, length)
        expected = huggingface.logits(reference, tokens)
        assert 1 < np.abs(expected).max() < 100  # else the limit below would mean nothing
        assert np.abs(score(engine, tokens) - expected).max() <= 1e-4


@pytest.mark.parametrize("name", random_models.CONFIGS)
def test_every_token_of_pytorchs_greedy_answer_is_the_most_likely_one(name):
    config, _, reference, engine = model(name)
    prompt, expected = huggingface.decided_prompt(reference, config, PROMPT, STEPS)
    logits = score(engine, (*prompt, *expected))
    assert logits[PROMPT - 1 : -1].argmax(-1).tolist() == expected


# Decoding costs several compilations: some configurations, of every kind.
@pytest.mark.parametrize("name", list(random_models.CONFIGS)[3::9])
def test_decoding_gives_pytorchs_greedy_answer(name):
    config, _, reference, engine = model(name)
    prompt, expected = huggingface.decided_prompt(reference, config, PROMPT, STEPS)
    assert answer(engine, prompt, STEPS) == expected


@pytest.mark.parametrize("name", list(random_models.CONFIGS)[1::6])
def test_bfloat16_stays_close_to_pytorch_in_float32(name):
    config, weights, reference, _ = model(name)
    tokens = random_models.tokens(config, 2 * SLICE)
    expected = log_softmax(huggingface.logits(reference, tokens))
    actual = log_softmax(score(make_engine(config, weights, jnp.bfloat16), tokens))
    divergence = (np.exp(expected) * (expected - actual)).sum(-1)
    assert divergence.mean() <= 1e-2


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.demo
def test_the_demo_model_equals_pytorch_over_a_text():
    reference, engine = demo_models()
    tokens = demo_checkpoint.tokens(2000)
    expected = huggingface.logits(reference, tokens)
    start = 0
    for block in engine.score(tokens):
        assert np.abs(block - expected[start : start + len(block)]).max() <= 1e-3
        start += len(block)
    assert start == len(tokens)


@pytest.mark.long  # the suite compares it with what PyTorch answered: test_goldens
@pytest.mark.demo
def test_a_greedy_answer_of_the_demo_model_equals_pytorch_token_by_token():
    reference, engine = demo_models()
    prompt = demo_checkpoint.tokens(300)
    expected, _ = huggingface.greedy(reference, prompt, STEPS)
    assert answer(engine, prompt, STEPS) == expected


@functools.cache
def demo_models():
    config, weights = demo_checkpoint.load()
    reference = Qwen2ForCausalLM.from_pretrained(demo_checkpoint.directory(), dtype=torch.float32)
    tree = jax.tree.map(jnp.asarray, weights)
    return reference.eval(), Engine(config, tree, EngineConfig(max_len=2000, slices=(512,)))
