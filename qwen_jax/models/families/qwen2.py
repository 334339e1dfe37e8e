"""Qwen2 and Qwen2.5 (arXiv:2412.15115): dense decoders of text, with biased q, k and v."""

from qwen_jax.config import ModelConfig
from qwen_jax.hf_config import DECODER, architecture, off
from qwen_jax.models.decoder import Decoder
from qwen_jax.models.family import Family, Place


class Qwen2(Decoder):
    """The decoder as it is."""


def tensors(config: ModelConfig) -> dict[str, Place]:
    """See `Family.tensors`."""
    D, F, V = config.embed_dim, config.mlp_dim, config.vocab_size
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    block = {
        "input_layernorm.weight": Place("attention_norm.scale", (D,), (D,)),
        "self_attn.q_proj.weight": Place("attention.q.kernel", (N * H, D), (D, N, H)),
        "self_attn.q_proj.bias": Place("attention.q.bias", (N * H,), (N, H)),
        "self_attn.k_proj.weight": Place("attention.k.kernel", (K * H, D), (D, K, H)),
        "self_attn.k_proj.bias": Place("attention.k.bias", (K * H,), (K, H)),
        "self_attn.v_proj.weight": Place("attention.v.kernel", (K * H, D), (D, K, H)),
        "self_attn.v_proj.bias": Place("attention.v.bias", (K * H,), (K, H)),
        "self_attn.o_proj.weight": Place("attention.o.kernel", (D, N * H), (N, H, D)),
        "post_attention_layernorm.weight": Place("mlp_norm.scale", (D,), (D,)),
        "mlp.gate_proj.weight": Place("mlp.gate.kernel", (F, D), (D, F)),
        "mlp.up_proj.weight": Place("mlp.up.kernel", (F, D), (D, F)),
        "mlp.down_proj.weight": Place("mlp.down.kernel", (D, F), (F, D)),
    }
    return {
        "model.embed_tokens.weight": Place("embed.embedding", (V, D), (V, D)),
        **{
            f"model.layers.{{layer}}.{name}": place._replace(path=f"blocks.{place.path}")
            for name, place in block.items()
        },
        "model.norm.weight": Place("norm.scale", (D,), (D,)),
        "lm_head.weight": Place("head.kernel", (V, D), (D, V)),
    }


_PUBLISHED = {
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


def _published(layers: int, width: int, mlp: int, heads: int, kv_heads: int) -> dict:
    return _PUBLISHED | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


FAMILY = Family(
    rules=DECODER
    | {
        "architectures": architecture("Qwen2ForCausalLM"),
        # What other models of the same code have, which a checkpoint may also switch off by name.
        **dict.fromkeys(("attention_bias", "qkv_bias"), off(True)),
        **dict.fromkeys(("qk_norm", "use_qk_norm"), off(False)),
    },
    module=Qwen2,
    tensors=tensors,
    presets={
        "7b": _published(28, 3584, 18944, 28, 4),
        "14b": _published(48, 5120, 13824, 40, 8),
    },
)
