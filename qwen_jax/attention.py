"""The attention layer: project, rotate, write the cache, attend, project."""

from flax import nnx

from qwen_jax.config import ModelConfig
from qwen_jax.layers import Projection


class Attention(nnx.Module):
    """Grouped-query attention with biased query, key and value projections."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        into = {"rngs": rngs, "dtype": dtype, "embed": D}
        self.q = Projection("TD,DNH->TNH", **into, heads=N, head_dim=H, bias=("heads", "head_dim"))
        self.k = Projection(
            "TD,DKH->TKH", **into, kv_heads=K, head_dim=H, bias=("kv_heads", "head_dim")
        )
        self.v = Projection(
            "TD,DKH->TKH", **into, kv_heads=K, head_dim=H, bias=("kv_heads", "head_dim")
        )
        self.o = Projection("TNH,NHD->TD", rngs=rngs, dtype=dtype, heads=N, head_dim=H, embed=D)
