"""The attention layer: project, rotate, write the cache, attend, project."""

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
        cache = self.write_slice(x, cache, layer, step, angles)
        out, _ = prefill(
            self._queries(x, step, angles),
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

    def write_slice(
        self,
        x: Float[Array, "T D"],
        cache: Cache,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
    ) -> Cache:
        """The cache with a slice of one sequence (`model.PrefillStep`) written."""
        keys, values = self._keys_values(x, step, angles)
        return write_slice(cache, layer, keys, values, step.page_table, step.start, step.length)

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
        keys, values = self._keys_values(x, step, angles)
        cache = write_tokens(cache, layer, keys, values, step.page_table, step.positions)
        return self.read_tokens(x, cache, layer, step, angles, backend), cache

    def read_tokens(
        self,
        x: Float[Array, "B D"],
        cache: Cache,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
        backend: str | None,
    ) -> Float[Array, "B D"]:
        """One token of each sequence (`model.DecodeStep`), which the cache holds already."""
        out, _ = decode(
            self._queries(x, step, angles),
            cache.keys,
            cache.values,
            layer,
            step.page_table,
            step.positions,
            geometry=self.geometry,
            backend_name=backend,
        )
        return self.o(out)

    def _queries(self, x, step, angles: rope.Angles) -> Float[Array, "views T N H"]:
        return rope.views(self.q(x), angles.query, step.query_scale * jnp.float32(self.scale))

    def _keys_values(self, x, step, angles: rope.Angles):
        key = rope.Rotary(*(part[None] for part in angles.key))
        return rope.views(self.k(x), key, step.key_scale)[0], self.v(x)
