"""The attention layer: project, rotate, write the cache, attend, project."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.decode import decode
from pallas_kernels.prefill import prefill
from qwen_jax import rope
from qwen_jax.cache import Cache, write_slice, write_tokens
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
        self.geometry = config.dual_chunk
        self.scale = config.head_dim**-0.5

    def project(
        self, x: Float[Array, "T D"], angles: rope.Angles, query_scale: jax.Array, key_scale
    ):
        """Query views, keys and values of T tokens; scales are [] or [T]."""
        queries = rope.views(self.q(x), angles.query, query_scale * jnp.float32(self.scale))
        keys = rope.views(self.k(x), rope.Rotary(*(a[None] for a in angles.key)), key_scale)[0]
        return queries, keys, self.v(x)

    def prefill(
        self,
        x: Float[Array, "T D"],
        cache: Cache,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
        backend: str | None,
    ) -> tuple[Float[Array, "T D"], Cache]:
        """A slice of one sequence (`model.PrefillStep`) and the cache with it written."""
        queries, keys, values = self.project(x, angles, step.query_scale, step.key_scale)
        cache = write_slice(cache, layer, keys, values, step.page_table, step.start, step.length)
        out, _ = prefill(
            queries,
            cache.keys,
            cache.values,
            layer,
            step.page_table,
            step.start,
            step.length,
            geometry=self.geometry,
            backend_name=backend,
        )
        return self.o(out), cache

    def decode(
        self,
        x: Float[Array, "B D"],
        cache: Cache,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
        backend: str | None,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """One token of each sequence (`model.DecodeStep`) and the cache with it written."""
        queries, keys, values = self.project(x, angles, step.query_scale, step.key_scale)
        cache = write_tokens(cache, layer, keys, values, step.page_table, step.positions)
        out, _ = decode(
            queries,
            cache.keys,
            cache.values,
            layer,
            step.page_table,
            step.positions,
            geometry=self.geometry,
            backend_name=backend,
        )
        return self.o(out), cache
