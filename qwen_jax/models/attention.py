"""The attention layer: project, rotate, write the cache, attend, project.

Between the projections all happens in `spread.run`, so that the same code serves one device
and a mesh.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import plan
from pallas_kernels.decode import decode
from pallas_kernels.dispatch.backend import Choice
from pallas_kernels.dispatch.tiles import Tiles, of_page
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.prefill import prefill
from pallas_kernels.select import Votes, select_keys, vote
from pallas_kernels.shard import WHOLE, Shard
from qwen_jax.config import ModelConfig
from qwen_jax.models import rope, sequence_parallel
from qwen_jax.models.kv_cache import write_slice, write_tokens
from qwen_jax.models.layers import Projection
from qwen_jax.sparse.budgets import Budgets, Report
from qwen_jax.sparse.recall import ROWS, Grid, Survey, recall_grid

RECALL_ROWS = 16  # of a sparse slice, that are compared with dense attention
LEFT_OUT = "left out"
"""In place of a backend: queries are handed on as they are, to measure what all else takes."""


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
        cache: PagedKV,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
        backend: Choice,
    ) -> tuple[Float[Array, "T D"], PagedKV]:
        """A slice of one sequence (`qwen2.PrefillStep`) and the cache with it written."""

        def attend(part, cache, rows, rest, _):
            layer, step, angles = rest
            query, key, value = map(part.all_tokens, rows)
            cache = self._write_slice(cache, layer, step, angles, key, value, part.shard)
            queries = self._views(query, step, angles)
            slice_ = step.start, step.length
            out, lse = self._attend(queries, cache, layer, step, *slice_, backend, part.shard)
            return cache, part.merge(out, lse), None

        rows = self.q(x), self.k(x), self.v(x)
        rest, split = (layer, step, angles), sequence_parallel.splits(len(x))
        cache, out, _ = sequence_parallel.run(attend, cache, rows, rest, split=split)
        return self.o(out), cache

    def prefill_sparse(
        self,
        x: Float[Array, "T D"],
        cache: PagedKV,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
        votes: rope.Rotary,
        budgets: Budgets,
        backend: Choice,
    ) -> tuple[Float[Array, "T D"], PagedKV, Report]:
        """As `prefill`, of the columns and diagonals that the last queries of the slice choose.

        Args:
            votes: `rope.critical` of the last `budgets.last_q` positions.

        Returns:
            Also how it was done.
        """

        def attend(part, cache, rows, rest, kept):
            layer, step, angles, votes, budgets = rest
            query, key, value = map(part.all_tokens, rows)
            cache = self._write_slice(cache, layer, step, angles, key, value, part.shard)
            listed = self._plan(
                query, cache, layer, step, votes, budgets, kept, backend, part.shard
            )
            queries = self._views(query, step, angles)
            out, lse, report = self._attend_listed(
                queries, cache, layer, step, listed, budgets.least_recall, backend, part.shard
            )
            return cache, part.merge(out, lse), report

        rows = self.q(x), self.k(x), self.v(x)
        kept = budgets.vertical[layer], budgets.slash[layer]
        rest, split = (layer, step, angles, votes, budgets), sequence_parallel.splits(len(x))
        cache, out, report = sequence_parallel.run(attend, cache, rows, rest, kept, split=split)
        return self.o(out), cache, report

    def sparse_plan(
        self,
        x: Float[Array, "T D"],
        cache: PagedKV,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
        votes: rope.Rotary,
        budgets: Budgets,
        backend: Choice,
    ) -> tuple[plan.SparsePlan, PagedKV]:
        """The plan of `prefill_sparse` before the guard of `budgets.least_recall`; no mesh."""
        cache = self.write_slice(x, cache, layer, step, angles)
        kept = budgets.vertical[layer], budgets.slash[layer]
        args = self.q(x), cache, layer, step, votes, budgets, kept, backend, WHOLE
        return self._plan(*args), cache

    def survey(
        self,
        x: Float[Array, "T D"],
        cache: PagedKV,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
        votes: rope.Rotary,
        grid: Grid,
        backend: Choice,
    ) -> tuple[Float[Array, "T D"], PagedKV, Survey]:
        """As `prefill`, and what each pair of budgets would have found of it; no mesh."""
        cache = self.write_slice(x, cache, layer, step, angles)
        T, start, length = x.shape[0], step.start, step.length
        query = self.q(x)
        queries = self._views(query, step, angles)
        out, lse = self._attend(queries, cache, layer, step, start, length, backend, WHOLE)
        count = min(ROWS, T)
        rows = jnp.arange(count, dtype=jnp.int32) * length // count
        surveyed = recall_grid(
            queries[:, rows],
            lse[rows],
            rows,
            self._vote(query, cache, layer, step, votes, backend, WHOLE),
            cache,
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
        cache: PagedKV,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
    ) -> PagedKV:
        """The cache with a slice of one sequence (`qwen2.PrefillStep`) written."""

        def write(part, cache, rows, rest, _):
            layer, step, angles = rest
            key, value = map(part.all_tokens, rows)
            cache = self._write_slice(cache, layer, step, angles, key, value, part.shard)
            return cache, None, None

        rows = self.k(x), self.v(x)
        rest, split = (layer, step, angles), sequence_parallel.splits(len(x))
        return sequence_parallel.run(write, cache, rows, rest, split=split)[0]

    def decode(
        self,
        x: Float[Array, "B D"],
        cache: PagedKV,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
        backend: Choice,
    ) -> tuple[Float[Array, "B D"], PagedKV]:
        """One token of each sequence (`qwen2.DecodeStep`) and the cache with it written."""

        def attend(part, cache, rows, rest, _):
            layer, step, angles = rest
            query, key, value = rows
            keys = self._rotated_keys(key, step, angles)
            table, positions = step.page_table, step.positions
            cache = write_tokens(cache, layer, keys, value, table, positions, part.shard)
            return cache, self._read(part, query, cache, layer, step, angles, backend), None

        rows = self.q(x), self.k(x), self.v(x)
        rest = layer, step, angles
        cache, out, _ = sequence_parallel.run(attend, cache, rows, rest, split=False)
        return self.o(out), cache

    def read_tokens(
        self,
        x: Float[Array, "B D"],
        cache: PagedKV,
        layer: Int[Array, ""],
        step,
        angles: rope.Angles,
        backend: Choice,
    ) -> tuple[Float[Array, "B D"], PagedKV]:
        """One token of each sequence (`qwen2.DecodeStep`), which the cache holds already."""

        def attend(part, cache, rows, rest, _):
            (query,), (layer, step, angles) = rows, rest
            return cache, self._read(part, query, cache, layer, step, angles, backend), None

        rest = layer, step, angles
        cache, out, _ = sequence_parallel.run(attend, cache, (self.q(x),), rest, split=False)
        return self.o(out), cache

    def _read(
        self,
        part: sequence_parallel.LocalShard,
        query,
        cache: PagedKV,
        layer,
        step,
        angles,
        backend,
    ):
        if getattr(backend, "decode", None) == LEFT_OUT:
            return query
        out, lse = decode(
            self._views(query, step, angles)[:, :, None],
            cache,
            layer,
            step.page_table,
            step.positions[:, None],
            geometry=self.geometry,
            shard=part.shard,
            backend_name=backend,
        )
        return part.merge(out[:, 0], lse[:, 0])

    def _plan(
        self,
        query,
        cache: PagedKV,
        layer,
        step,
        votes,
        budgets: Budgets,
        kept,
        backend,
        shard: Shard,
    ) -> plan.SparsePlan:
        T, start, length = len(query), step.start, step.length
        cast = self._vote(query, cache, layer, step, votes, backend, shard)
        return plan.build(
            *select_keys(cast, start + length, *kept, shard=shard),
            start,
            length,
            num_queries=T,
            num_columns=budgets.num_columns,
            tiles=Tiles(min(T, budgets.tiles.q), of_page(cache.page, budgets.tiles.k)),
            shard=shard,
        )

    def _attend_listed(
        self, queries, cache: PagedKV, layer, step, listed, least_recall, backend, shard: Shard
    ):
        """Output and log-sum-exp over the keys of a plan, and how well it did."""
        T, start, length = queries.shape[1], step.start, step.length

        def attend(queries, start, length, listed=None):
            return self._attend(queries, cache, layer, step, start, length, backend, shard, listed)

        out, lse = attend(queries, start, length, listed)

        # What the last rows find, against all there is to find.
        count = min(T, RECALL_ROWS)
        first = jnp.maximum(length - count, 0)
        _, full = attend(
            jax.lax.dynamic_slice_in_dim(queries, first, count, 1), start + first, length - first
        )
        found = jax.lax.dynamic_slice_in_dim(lse, first, count)
        found, full = shard.merge_lse(found), shard.merge_lse(full)
        found = jnp.exp(jnp.minimum(found - full, 0))  # rounding must not show as more than all
        counts = (jnp.arange(count) < length - first)[:, None]
        recall = jnp.where(counts, found, 0).sum(0) / counts.sum(dtype=jnp.float32)
        density = plan.density(listed, start, length, shard=shard)

        poor = recall < least_recall

        def read_all():
            all_keys = plan.everything(listed, poor, start, length, shard=shard)
            more, more_lse = attend(queries, start, length, all_keys)
            return jnp.where(poor[:, None], more, out), jnp.where(poor, more_lse, lse)

        out, lse = jax.lax.cond(poor.any(), read_all, lambda: (out, lse))
        report = Report(density=jnp.where(poor, 1.0, density), recall=jnp.where(poor, 1.0, recall))
        return out, lse, report

    def _vote(
        self, query, cache: PagedKV, layer, step, votes: rope.Rotary, backend, shard: Shard
    ) -> Votes:
        last_q = votes.cos.shape[1]
        index = step.length - last_q + jnp.arange(last_q)
        voters = jnp.take(query, index, axis=0, mode="clip")
        return vote(
            rope.rotate_views(voters, votes, step.query_scale * jnp.float32(self.scale)),
            cache,
            layer,
            step.page_table,
            step.start,
            step.length,
            geometry=self.geometry,
            shard=shard,
            backend_name=backend,
        )

    def _attend(
        self, queries, cache: PagedKV, layer, step, start, length, backend, shard, listed=None
    ):
        if getattr(backend, "prefill", None) == LEFT_OUT:
            return queries[0], jnp.zeros(queries.shape[1:3])
        return prefill(
            queries,
            cache,
            layer,
            step.page_table,
            start,
            length,
            geometry=self.geometry,
            plan=listed,
            shard=shard,
            backend_name=backend,
        )

    def _write_slice(
        self, cache: PagedKV, layer, step, angles, key, value, shard: Shard
    ) -> PagedKV:
        keys = self._rotated_keys(key, step, angles)
        table, start, length = step.page_table, step.start, step.length
        return write_slice(cache, layer, keys, value, table, start, length, shard)

    def _views(self, query, step, angles: rope.Angles) -> Float[Array, "views T N H"]:
        return rope.rotate_views(query, angles.query, step.query_scale * jnp.float32(self.scale))

    def _rotated_keys(self, key, step, angles: rope.Angles) -> Float[Array, "T K H"]:
        one_view = rope.Rotary(*(part[None] for part in angles.key))
        return rope.rotate_views(key, one_view, step.key_scale)[0]
