"""A second family of models in one file: Qwen3, dense (arXiv:2505.09388), and a tiny one of it."""

from jaxtyping import Array, Float

from qwen_jax.config import ModelConfig
from qwen_jax.hf_config import DECODER, architecture, decoder_config, off
from qwen_jax.models.attention import Attention
from qwen_jax.models.decoder import Decoder
from qwen_jax.models.families import qwen2
from qwen_jax.models.family import Family, Place
from qwen_jax.models.layers import RMSNorm


class Qwen3Attention(Attention):
    """Queries and keys are normalized, each head by itself; no projection has a bias."""

    def __init__(self, config: ModelConfig, *, dtype, **rest):
        super().__init__(config, dtype=dtype, bias=False, **rest)
        norm = {"eps": config.norm_eps, "dtype": dtype, "axis": "head_dim"}
        self.q_norm = RMSNorm(config.head_dim, **norm)
        self.k_norm = RMSNorm(config.head_dim, **norm)

    def project(
        self, x: Float[Array, "T D"]
    ) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
        query, key, value = super().project(x)
        return self.q_norm(query), self.k_norm(key), value


class Qwen3(Decoder):
    attention = Qwen3Attention


def tensors(config: ModelConfig) -> dict[str, Place]:
    H, at = config.head_dim, "model.layers.{layer}.self_attn."
    found = qwen2.tensors(config)
    return {name: place for name, place in found.items() if not name.endswith(".bias")} | {
        f"{at}q_norm.weight": Place("blocks.attention.q_norm.scale", (H,), (H,)),
        f"{at}k_norm.weight": Place("blocks.attention.k_norm.scale", (H,), (H,)),
    }


FAMILY = Family(
    rules=DECODER
    | {"architectures": architecture("Qwen3ForCausalLM"), "attention_bias": off(False)},
    config=lambda path, model_type, found: decoder_config(
        path, model_type, {"head_dim": 128, **found}
    ),
    module=Qwen3,
    tensors=tensors,
    presets={
        "qwen3-0.6b": {
            "model_type": "qwen3",
            "num_hidden_layers": 28,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        }
    },
)
