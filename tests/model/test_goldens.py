"""The engine against recorded answers of PyTorch (scripts/record_goldens.py), without PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import demo_checkpoint, goldens, random_models

from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.request import Request


@pytest.mark.parametrize(
    "name",
    [
        *goldens.TINY[::2],
        *(pytest.param(name, marks=pytest.mark.long) for name in goldens.TINY[1::2]),
    ],
)
def test_tiny_models_answer_as_pytorch_did(name):
    config = random_models.CONFIGS[name]
    weights = random_models.weights(config)
    with np.load(goldens.TINY_PATH, allow_pickle=False) as golden:
        assert goldens.fingerprint(weights) == golden[f"{name}/fingerprint"].item(), (
            "numpy draws other weights now: run scripts/record_goldens.py"
        )
        expected, prompt, answer = (
            golden[f"{name}/{part}"] for part in ("logits", "prompt", "answer")
        )
    tree = jax.tree.map(jnp.asarray, weights)
    engine = Engine(config, tree, EngineConfig(max_len=256, slices=(64,)))
    tokens = random_models.tokens(config, goldens.TINY_LENGTH)
    actual = np.concatenate(list(engine.score(tokens)))
    assert np.abs(actual - expected).max() <= 1e-4
    request = Request(prompt=tuple(prompt.tolist()), max_new_tokens=goldens.STEPS)
    assert engine.run([request]) == [answer.tolist()]


@pytest.mark.demo
def test_the_demo_model_answers_as_pytorch_did():
    config, weights = demo_checkpoint.load()
    tree = jax.tree.map(jnp.asarray, weights)
    engine = Engine(config, tree, EngineConfig(max_len=goldens.DEMO_LENGTH, slices=(512,)))
    with np.load(goldens.DEMO_PATH, allow_pickle=False) as golden:
        tokens, prompt, answer = (golden[name] for name in ("tokens", "prompt", "answer"))
        expected = {name: golden[name] for name in ("columns", "top", "log_sum_exp")}
    blocks = [goldens.summary(block) for block in engine.score(tuple(tokens.tolist()))]
    for name, values in expected.items():
        actual = np.concatenate([block[name] for block in blocks])
        assert np.abs(actual - values).max() <= 1e-3
    request = Request(prompt=tuple(prompt.tolist()), max_new_tokens=goldens.STEPS)
    assert engine.run([request]) == [answer.tolist()]
