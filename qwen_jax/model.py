"""Block and Qwen2: tokens + Step -> logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_jax.attention import Attention
from qwen_jax.config import ModelConfig
from qwen_jax.layers import Embedding, GatedMLP, Projection, RMSNorm


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.attention_norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config, rngs=rngs, dtype=dtype)


class Qwen2(nnx.Module):
    """Qwen2 decoder whose blocks are stacked on a leading layer axis and scanned."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, dtype=jnp.bfloat16):
        def block(key):
            return Block(config, rngs=nnx.Rngs(key), dtype=dtype)

        rest, blocks = jax.random.split(key)
        rngs = nnx.Rngs(rest)
        D, V = config.embed_dim, config.vocab_size
        self.embed = Embedding(V, D, rngs=rngs, dtype=dtype)
        one = nnx.graphdef(nnx.eval_shape(lambda: block(blocks)))
        keys = jax.random.split(blocks, config.num_layers)
        self.blocks = nnx.merge(one, jax.vmap(lambda key: nnx.state(block(key)))(keys))
        self.norm = RMSNorm(D, eps=config.norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.head = Projection("TD,DV->TV", rngs=rngs, dtype=dtype, embed=D, vocab=V)
        self.config = config
