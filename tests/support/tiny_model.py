"""A model so small that verbs run on it in seconds."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from support.vocabularies import byte_level, save, small_vocabulary

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 320,
}


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of `CONFIG` under their Hugging Face names."""
    random = np.random.default_rng(seed)
    D, F, V, KH = 32, 48, 320, 16

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32) * 0.3

    weights = {"model.embed_tokens.weight": normal(V, D), "model.norm.weight": 1 + normal(D)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, out in (("q", D), ("k", KH), ("v", KH)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(out, D)
            weights[f"{prefix}self_attn.{name}_proj.bias"] = normal(out)
        weights[f"{prefix}self_attn.o_proj.weight"] = normal(D, D)
        weights[f"{prefix}mlp.gate_proj.weight"] = normal(F, D)
        weights[f"{prefix}mlp.up_proj.weight"] = normal(F, D)
        weights[f"{prefix}mlp.down_proj.weight"] = normal(D, F)
        weights[f"{prefix}input_layernorm.weight"] = 1 + normal(D)
        weights[f"{prefix}post_attention_layernorm.weight"] = 1 + normal(D)
    return weights


def write(directory: Path) -> Path:
    """Write a Hugging Face directory of a random model with a tokenizer."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(random_weights(), directory / "model.safetensors", metadata={"format": "pt"})
    return save(byte_level(*small_vocabulary()), directory)
