"""Tiny Qwen2 configurations and weights from numpy's generator: the same in any environment."""

import itertools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import ModelConfig

HEADS = ((1, 1), (2, 1), (2, 2), (4, 2), (7, 1), (6, 3), (5, 1), (8, 4))


def config(
    seed: int = 0,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    tied: bool = False,
    dual_chunk: ChunkGeometry | None = None,
    original_len: int = 0,
    vocab_size: int | None = None,
) -> ModelConfig:
    rng = np.random.default_rng(seed)
    return ModelConfig(
        num_layers=int(rng.integers(1, 4)),
        vocab_size=int(vocab_size or rng.integers(50, 200)),
        embed_dim=int(rng.integers(24, 100)),
        mlp_dim=int(rng.integers(32, 150)),
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        rope_theta=float(rng.choice([1e4, 1e6, 1e7])),
        norm_eps=float(rng.choice([1e-5, 1e-6])),
        tie_embeddings=tied,
        max_len=4096,
        weights_dtype="float32",
        dual_chunk=dual_chunk,
        original_len=original_len,
    )


def smallest(**fields) -> ModelConfig:
    """A configuration of small sizes, but for the fields that are given."""
    usual = {
        "num_layers": 1,
        "vocab_size": 8,
        "embed_dim": 8,
        "mlp_dim": 8,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "rope_theta": 1e4,
        "norm_eps": 1e-6,
        "tie_embeddings": True,
        "max_len": 64,
    }
    return ModelConfig(**usual | fields)


# Every ratio of heads with both head sizes, tied and untied: 32 configurations.
CONFIGS = {
    f"{N}-{K}-heads-of-{H}-{'tied' if tied else 'untied'}": config(
        seed, heads=(N, K), head_dim=H, tied=tied
    )
    for seed, ((N, K), H, tied) in enumerate(itertools.product(HEADS, (64, 128), (True, False)))
}


def weights(config: ModelConfig, seed: int = 0) -> dict:
    """A parameter tree whose logits are of order 1 to 10 and whose biases are not small."""
    rng = np.random.default_rng([seed, 7])
    L, V, D, F = config.num_layers, config.vocab_size, config.embed_dim, config.mlp_dim
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim

    def normal(*shape: int, std: float) -> np.ndarray:
        return std * rng.standard_normal(shape, np.float32)

    def scale(*shape: int) -> np.ndarray:
        return 1 + normal(*shape, std=0.2)

    tree = {
        "embed": {"embedding": normal(V, D, std=3 * D**-0.5)},
        "blocks": {
            "attention_norm": {"scale": scale(L, D)},
            "attention": {
                "q": {"kernel": normal(L, D, N, H, std=D**-0.5), "bias": normal(L, N, H, std=0.5)},
                "k": {"kernel": normal(L, D, K, H, std=D**-0.5), "bias": normal(L, K, H, std=1)},
                "v": {"kernel": normal(L, D, K, H, std=D**-0.5), "bias": normal(L, K, H, std=0.5)},
                "o": {"kernel": normal(L, N, H, D, std=(N * H) ** -0.5)},
            },
            "mlp_norm": {"scale": scale(L, D)},
            "mlp": {
                "gate": {"kernel": normal(L, D, F, std=D**-0.5)},
                "up": {"kernel": normal(L, D, F, std=D**-0.5)},
                "down": {"kernel": normal(L, F, D, std=F**-0.5)},
            },
        },
        "norm": {"scale": scale(D)},
    }
    if not config.tie_embeddings:
        tree["head"] = {"kernel": normal(D, V, std=3 * D**-0.5)}
    return tree


def tokens(config: ModelConfig, length: int, seed: int = 0) -> tuple[int, ...]:
    rng = np.random.default_rng([seed, length])
    return tuple(int(token) for token in rng.integers(0, config.vocab_size, length))


def state_dict(config: ModelConfig, weights: dict) -> dict[str, np.ndarray]:
    """Hugging Face names and [out, in] shapes (arXiv:2412.15115's released checkpoints)."""
    D = config.embed_dim
    blocks = weights["blocks"]
    attention, mlp = blocks["attention"], blocks["mlp"]
    state = {
        "model.embed_tokens.weight": weights["embed"]["embedding"],
        "model.norm.weight": weights["norm"]["scale"],
    }
    if not config.tie_embeddings:
        state["lm_head.weight"] = weights["head"]["kernel"].T
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}"
        state[f"{at}.input_layernorm.weight"] = blocks["attention_norm"]["scale"][layer]
        state[f"{at}.post_attention_layernorm.weight"] = blocks["mlp_norm"]["scale"][layer]
        for name in "qkv":
            state[f"{at}.self_attn.{name}_proj.weight"] = (
                attention[name]["kernel"][layer].reshape(D, -1).T
            )
            state[f"{at}.self_attn.{name}_proj.bias"] = attention[name]["bias"][layer].reshape(-1)
        state[f"{at}.self_attn.o_proj.weight"] = attention["o"]["kernel"][layer].reshape(-1, D).T
        for name in ("gate", "up", "down"):
            state[f"{at}.mlp.{name}_proj.weight"] = mlp[name]["kernel"][layer].T
    return {name: np.ascontiguousarray(array) for name, array in state.items()}


def save(config: ModelConfig, weights: dict, directory: Path) -> None:
    """Write a Hugging Face directory without a tokenizer."""
    fields = {
        "model_type": "qwen2",
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(state_dict(config, weights), directory / "model.safetensors")
