"""YaRN as the model cards of Qwen2.5 prescribe it, against transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from support import huggingface, random_models
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen_jax.config import ModelConfig, Yarn
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.request import Request
from qwen_jax.models import rope
from qwen_jax.models.configs import model_config

pytestmark = pytest.mark.torch

CARD = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
SCALINGS = {
    "as the card says": CARD,
    "without a training length": {"factor": 2, "type": "yarn"},
    "factor 1": {**CARD, "factor": 1},
    "a factor of attention": {**CARD, "attention_factor": 0.9},
    "other bounds": {**CARD, "beta_fast": 16, "beta_slow": 2.5},
    "bounds that are not rounded": {**CARD, "truncate": False},
    "equal bounds": {**CARD, "beta_fast": 3, "beta_slow": 3, "truncate": False},
    "scales": {**CARD, "mscale": 0.7, "mscale_all_dim": 1.3},
    "one scale": {**CARD, "mscale": 0.7},
    "a short training": {**CARD, "original_max_position_embeddings": 5},
}
LENGTH = 131072
SLICE = 64


def read(tmp_path, spelling: str, **changes) -> tuple[ModelConfig, dict]:
    """Our configuration and the file that it was read from."""
    raw = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 96,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "float32",
        spelling: changes,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return model_config(tmp_path), raw


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_angles_are_those_of_transformers(tmp_path, spelling, name):
    config, raw = read(tmp_path, spelling, **SCALINGS[name])
    theirs = Qwen2RotaryEmbedding(Qwen2Config(**raw))
    positions = np.unique(np.geomspace(1, LENGTH, 3000).astype(np.int32)) - 1
    cos, sin = theirs(torch.zeros(1, 1, 1), torch.tensor(positions)[None])
    turns = rope.table(config, LENGTH).at(jnp.asarray(positions))
    assert config.yarn is not None
    assert theirs.attention_scaling == pytest.approx(config.yarn.attention_factor, rel=1e-7)
    # One of PyTorch's 64 frequencies of this base is an ulp off the correctly rounded one.
    for ours, expected in ((turns.cos, cos), (turns.sin, sin)):
        assert np.abs(np.asarray(ours) - expected[0, :, :64].numpy()).max() <= 1e-5


def test_logits_and_answers_are_those_of_transformers_beyond_the_training_length():
    yarn = Yarn(factor=4.0, original_len=64, attention_factor=1.1386294)
    config = dataclasses.replace(
        random_models.config(2, heads=(4, 2)), yarn=yarn, max_len=256, rope_theta=1e4
    )
    weights = random_models.weights(config)
    reference = huggingface.build(config, weights)
    tree = jax.tree.map(jnp.asarray, weights)
    engine = Engine(config, tree, EngineConfig(max_len=4 * SLICE, slices=(SLICE,)))
    plain = huggingface.build(dataclasses.replace(config, yarn=None), weights)
    for length in (1, 40, SLICE, 250):
        tokens = random_models.tokens(config, length)
        expected = huggingface.logits(reference, tokens)
        scores = np.concatenate(list(engine.score(tokens)))
        assert 1 < np.abs(expected).max() < 100
        assert np.abs(scores - expected).max() <= 1e-4
        if length > 1:
            assert np.abs(huggingface.logits(plain, tokens) - expected).max() > 1e-2
    prompt, answer = huggingface.decided_prompt(reference, config, 50, 40)
    assert engine.run([Request(prompt=prompt, max_new_tokens=40)])[0] == answer
