"""The attention layer: project, rotate, write the cache, attend, project."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import plan
from pallas_kernels.decode import decode
from pallas_kernels.prefill import prefill
from pallas_kernels.select import Votes, choose, vote
from pallas_kernels.tiles import Tiles, of_page
from qwen_jax import rope
from qwen_jax.cache import Cache, write_slice, write_tokens
from qwen_jax.config import ModelConfig
from qwen_jax.layers import Projection
from qwen_jax.sparse import Budgets, Report
from qwen_jax.survey import ROWS, Grid, Survey, survey

RECALL_ROWS = 16  # of a sparse slice, that are compared with dense attention


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
        queries = self._queries(x, step, angles)
        out, _ = self._attend(queries, cache, layer, step, step.start, step.length, backend)
        return self.o(out), cache

    def prefill_sparse(
        self,
        x: Float[Array, "T D"],
        cache: Cache,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
        votes: rope.Rotary,
        budgets: Budgets,
        backend: str | None,
    ) -> tuple[Float[Array, "T D"], Cache, Report, plan.SparsePlan]:
        """As `prefill`, of the columns and diagonals that the last queries of the slice choose.

        Args:
            votes: `rope.critical` of the last `budgets.last_q` positions.

        Returns:
            Also how it was done, and the plan before the guard of `budgets.least_recall`.
        """
        cache = self.write_slice(x, cache, layer, step, angles)
        T, start, length = x.shape[0], step.start, step.length
        cast = self._vote(x, cache, layer, step, votes, backend)
        selection = choose(cast, start + length, budgets.vertical[layer], budgets.slash[layer])
        listed = plan.build(
            *selection,
            start,
            length,
            num_queries=T,
            num_columns=budgets.num_columns,
            tiles=Tiles(min(T, budgets.tiles.q), of_page(cache.page, budgets.tiles.k)),
        )

        def attend(queries, start, length, listed=None):
            return self._attend(queries, cache, layer, step, start, length, backend, listed)

        queries = self._queries(x, step, angles)
        out, lse = attend(queries, start, length, listed)

        # What the last rows find, against all there is to find.
        count = min(T, RECALL_ROWS)
        first = jnp.maximum(length - count, 0)
        _, full = attend(
            jax.lax.dynamic_slice_in_dim(queries, first, count, 1), start + first, length - first
        )
        # Rounding must not show as more than all.
        found = jnp.exp(jnp.minimum(jax.lax.dynamic_slice_in_dim(lse, first, count) - full, 0))
        counts = (jnp.arange(count) < length - first)[:, None]
        recall = jnp.where(counts, found, 0).sum(0) / counts.sum(dtype=jnp.float32)
        density = plan.density(listed, start, length)

        poor = recall < budgets.least_recall

        def read_all():
            more, _ = attend(queries, start, length, plan.everything(listed, poor, start, length))
            return jnp.where(poor[:, None], more, out)

        out = jax.lax.cond(poor.any(), read_all, lambda: out)
        report = Report(density=jnp.where(poor, 1.0, density), recall=jnp.where(poor, 1.0, recall))
        return self.o(out), cache, report, listed

    def survey(
        self,
        x: Float[Array, "T D"],
        cache: Cache,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
        votes: rope.Rotary,
        grid: Grid,
        backend: str | None,
    ) -> tuple[Float[Array, "T D"], Cache, Survey]:
        """As `prefill`, and what each pair of budgets would have found of it."""
        cache = self.write_slice(x, cache, layer, step, angles)
        T, start, length = x.shape[0], step.start, step.length
        queries = self._queries(x, step, angles)
        out, lse = self._attend(queries, cache, layer, step, start, length, backend)
        count = min(ROWS, T)
        rows = jnp.arange(count, dtype=jnp.int32) * length // count
        surveyed = survey(
            queries[:, rows],
            lse[rows],
            rows,
            self._vote(x, cache, layer, step, votes, backend),
            cache.keys,
            layer,
            step.page_table,
            start,
            length,
            num_queries=T,
            grid=dataclasses.replace(
                grid, tiles=Tiles(grid.tiles.q, of_page(cache.page, grid.tiles.k))
            ),
            geometry=self.geometry,
        )
        return self.o(out), cache, surveyed

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
            self._queries(x, step, angles)[:, :, None],
            cache.keys,
            cache.values,
            layer,
            step.page_table,
            step.positions[:, None],
            geometry=self.geometry,
            backend_name=backend,
        )
        return self.o(out[:, 0])

    def _vote(self, x, cache: Cache, layer, step, votes: rope.Rotary, backend) -> Votes:
        last_q = votes.cos.shape[1]
        index = step.length - last_q + jnp.arange(last_q)
        voters = self.q(jnp.take(x, index, axis=0, mode="clip"))
        return vote(
            rope.views(voters, votes, step.query_scale * jnp.float32(self.scale)),
            cache.keys,
            layer,
            step.page_table,
            step.start,
            step.length,
            geometry=self.geometry,
            backend_name=backend,
        )

    def _attend(self, queries, cache: Cache, layer, step, start, length, backend, listed=None):
        return prefill(
            queries,
            cache.keys,
            cache.values,
            layer,
            step.page_table,
            start,
            length,
            geometry=self.geometry,
            plan=listed,
            backend_name=backend,
        )

    def _queries(self, x, step, angles: rope.Angles) -> Float[Array, "views T N H"]:
        return rope.views(self.q(x), angles.query, step.query_scale * jnp.float32(self.scale))

    def _keys_values(self, x, step, angles: rope.Angles):
        key = rope.Rotary(*(part[None] for part in angles.key))
        return rope.views(self.k(x), key, step.key_scale)[0], self.v(x)
