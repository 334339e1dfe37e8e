"""Presets: the config.json of the published models, without tokenizers and budgets."""

import json
from pathlib import Path

from qwen_jax.config import ModelConfig
from qwen_jax.hf_config import model_config

_COMMON = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "head_dim": 128,
    "max_position_embeddings": 1010000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 152064,
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    },
}
SIZES = {
    "7b": (28, 3584, 18944, 28, 4),
    "14b": (48, 5120, 13824, 40, 8),
}
NAMES = tuple(f"{name}-1m" for name in SIZES)
"""Short names of the published models, for users."""
HUB_IDS = {f"{name}-1m": f"Qwen/Qwen2.5-{name.upper()}-Instruct-1M" for name in SIZES}
"""Hub ids of the published models, by short name."""
_FIELDS = (
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads"
).split()


def find(name: str) -> str | None:
    """Returns the key of `SIZES` for a short name or a hub id; None for any other text."""
    keys = {alias: size for size, alias in zip(SIZES, NAMES, strict=True)}
    keys |= {HUB_IDS[alias]: size for alias, size in keys.items()}
    return keys.get(name)


def write(directory: Path, name: str) -> Path:
    """Writes the config.json of a published model into a directory, created if missing.

    Args:
        name: a key of `SIZES`.

    Returns:
        The directory.
    """
    directory.mkdir(exist_ok=True)
    raw = _COMMON | dict(zip(_FIELDS, SIZES[name], strict=True))
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def config(directory: Path, name: str) -> ModelConfig:
    """Writes the config.json of a published model into a directory and reads it back."""
    return model_config(write(directory, name))
