"""Attention layer: project, rotate, write the cache, attend, project.

Everything between the projections happens in `sequence_parallel.run`, so that the same code
serves one device and a mesh.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

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
from pallas_kernels.shard import Shard
from qwen_jax.config import ModelConfig
from qwen_jax.models import rope, sequence_parallel
from qwen_jax.models.kv_cache import write_slice, write_tokens
from qwen_jax.models.layers import Projection
from qwen_jax.models.sequence_parallel import ALONE, LocalShard
from qwen_jax.models.steps import PrefillStep
from qwen_jax.sparse.budgets import Budgets, Report
from qwen_jax.sparse.recall import ROWS, Grid, Survey, recall_grid

RECALL_ROWS = 16  # of a sparse slice, that are compared with dense attention


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layer", "step", "angles", "voter_angles", "budgets"],
    meta_fields=["backend", "local"],
)
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Inputs of attention beside activations and cache; arrays are replicated on all devices.

    Attributes:
        layer: index of the layer.
        step: a `PrefillStep` or a `DecodeStep`.
        angles: rotations of the step's tokens.
        voter_angles: rotations of the last queries of a slice, which vote in sparse selection
            (`rope.selection_angles`).
        budgets: budgets of sparse prefill.
        backend: backends of the attention operations; None for the preferred ones.
        local: part of the step that this device holds, inside `_on_devices`; else the whole.
    """

    layer: Any = 0
    step: Any
    angles: rope.Angles
    voter_angles: rope.Rotary | None = None
    budgets: Budgets | None = None
    backend: Choice = None
    local: LocalShard = ALONE

    def at(self, layer: Int[Array, ""]) -> "Context":
        """Returns the context of another layer of the same step."""
        return dataclasses.replace(self, layer=layer)

    @property
    def shard(self) -> Shard:
        """Part of the cache that this device holds."""
        return self.local.shard


class Attention(nnx.Module):
    """Grouped-query attention.

    Families of models replace `project`.

    Args:
        bias: of the query, key and value projections.
        skip_attention: hand queries on as they are, to measure what all else takes.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype,
        bias: bool = True,
        skip_attention: bool = False,
    ):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        into = {"rngs": rngs, "dtype": dtype, "embed": D}
        heads, kv_heads = (("heads", "head_dim"), ("kv_heads", "head_dim")) if bias else ((), ())
        self.q = Projection("TD,DNH->TNH", **into, heads=N, head_dim=H, bias=heads)
        self.k = Projection("TD,DKH->TKH", **into, kv_heads=K, head_dim=H, bias=kv_heads)
        self.v = Projection("TD,DKH->TKH", **into, kv_heads=K, head_dim=H, bias=kv_heads)
        self.o = Projection("TNH,NHD->TD", rngs=rngs, dtype=dtype, heads=N, head_dim=H, embed=D)
        self.geometry = config.dual_chunk
        self.scale = config.head_dim**-0.5
        self.is_skipped = skip_attention

    def project(
        self, x: Float[Array, "T D"]
    ) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
        """Computes queries, keys and values, before they are rotated."""
        return self.q(x), self.k(x), self.v(x)

    def prefill(
        self, x: Float[Array, "T D"], cache: PagedKV, context: Context
    ) -> tuple[Float[Array, "T D"], PagedKV]:
        """Returns the output of a `PrefillStep`, and the cache with its keys and values written."""

        def attend(cache, rows, context, _):
            query, key, value = map(context.local.all_tokens, rows)
            cache = self._write_slice(cache, context, key, value)
            start, length = context.step.start, context.step.length
            out, lse = self._attend(self._views(query, context), cache, context, start, length)
            return cache, context.local.merge(out, lse), None

        cache, out, _ = _on_devices(attend, cache, self.project(x), context)
        return self.o(out), cache

    def prefill_sparse(
        self, x: Float[Array, "T D"], cache: PagedKV, context: Context
    ) -> tuple[Float[Array, "T D"], PagedKV, Report]:
        """Attends only to the columns and diagonals that the slice's last queries vote for.

        Returns:
            As `prefill`, and density and recall of each head, arrays [N].
        """

        def attend(cache, rows, context, kept):
            query, key, value = map(context.local.all_tokens, rows)
            cache = self._write_slice(cache, context, key, value)
            listed = self._plan(query, cache, context, kept)
            queries = self._views(query, context)
            out, lse, report = self._attend_listed(queries, cache, context, listed)
            return cache, context.local.merge(out, lse), report

        kept = _kept(context)
        cache, out, report = _on_devices(attend, cache, self.project(x), context, kept)
        return self.o(out), cache, report

    def sparse_plan(
        self, x: Float[Array, "T D"], cache: PagedKV, context: Context
    ) -> tuple[plan.SparsePlan, PagedKV]:
        """Returns the plan of `prefill_sparse` before the guard of `budgets.least_recall`.

        Also returns the cache with the slice written. Not for a mesh.
        """
        query, key, value = self.project(x)
        cache = self._write_slice(cache, context, key, value)
        return self._plan(query, cache, context, _kept(context)), cache

    def survey(
        self, x: Float[Array, "T D"], cache: PagedKV, context: Context, grid: Grid
    ) -> tuple[Float[Array, "T D"], PagedKV, Survey]:
        """Attends as `prefill`; also returns the recall of each pair of budgets. Not for a mesh."""
        query, key, value = self.project(x)
        cache = self._write_slice(cache, context, key, value)
        step = context.step
        T, start, length = x.shape[0], step.start, step.length
        queries = self._views(query, context)
        out, lse = self._attend(queries, cache, context, start, length)
        count = min(ROWS, T)
        rows = jnp.arange(count, dtype=jnp.int32) * length // count
        surveyed = recall_grid(
            queries[:, rows],
            lse[rows],
            rows,
            self._vote(query, cache, context),
            cache,
            context.layer,
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

    def write(self, x: Float[Array, "T D"], cache: PagedKV, context: Context) -> PagedKV:
        """Returns the cache with the keys and values of a `PrefillStep` written."""

        def write(cache, rows, context, _):
            key, value = map(context.local.all_tokens, rows)
            return self._write_slice(cache, context, key, value), None, None

        _, key, value = self.project(x)
        return _on_devices(write, cache, (key, value), context)[0]

    def decode(
        self, x: Float[Array, "B D"], cache: PagedKV, context: Context
    ) -> tuple[Float[Array, "B D"], PagedKV]:
        """Returns the output of a `DecodeStep`, and the cache with its keys and values written."""

        def attend(cache, rows, context, _):
            query, key, value = rows
            step, keys = context.step, self._rotated_keys(key, context)
            table, positions = step.page_table, step.positions
            cache = write_tokens(cache, context.layer, keys, value, table, positions, context.shard)
            return cache, self._read(query, cache, context), None

        cache, out, _ = _on_devices(attend, cache, self.project(x), context)
        return self.o(out), cache

    def read(
        self, x: Float[Array, "B D"], cache: PagedKV, context: Context
    ) -> tuple[Float[Array, "B D"], PagedKV]:
        """Returns the output of a `DecodeStep` whose keys and values are in the cache already."""

        def attend(cache, rows, context, _):
            (query,) = rows
            return cache, self._read(query, cache, context), None

        query, _, _ = self.project(x)
        cache, out, _ = _on_devices(attend, cache, (query,), context)
        return self.o(out), cache

    def _read(self, query, cache: PagedKV, context: Context) -> Float[Array, "B N H"]:
        if self.is_skipped:
            return query
        step = context.step
        out, lse = decode(
            self._views(query, context)[:, :, None],
            cache,
            context.layer,
            step.page_table,
            step.positions[:, None],
            geometry=self.geometry,
            shard=context.shard,
            backend_name=context.backend,
        )
        return context.local.merge(out[:, 0], lse[:, 0])

    def _plan(self, query, cache: PagedKV, context: Context, kept) -> plan.SparsePlan:
        T, start, length = len(query), context.step.start, context.step.length
        budgets, shard = context.budgets, context.shard
        assert budgets is not None
        votes = self._vote(query, cache, context)
        return plan.build(
            *select_keys(votes, start + length, *kept, shard=shard),
            start,
            length,
            num_queries=T,
            num_columns=budgets.num_columns,
            tiles=Tiles(min(T, budgets.tiles.q), of_page(cache.page, budgets.tiles.k)),
            shard=shard,
        )

    def _attend_listed(self, queries, cache: PagedKV, context: Context, listed: plan.SparsePlan):
        """Attends to the keys of a plan; heads below the minimum recall attend densely.

        Returns:
            Output [T, N, H], log-sum-exp [T, N], and density and recall of each head [N].
        """
        T, start, length = queries.shape[1], context.step.start, context.step.length
        budgets, shard = context.budgets, context.shard
        assert budgets is not None
        out, lse = self._attend(queries, cache, context, start, length, listed)

        # What the last rows find, against all there is to find.
        count = min(T, RECALL_ROWS)
        first = jnp.maximum(length - count, 0)
        last = jax.lax.dynamic_slice_in_dim(queries, first, count, 1)
        _, full = self._attend(last, cache, context, start + first, length - first)
        found = jax.lax.dynamic_slice_in_dim(lse, first, count)
        found, full = shard.merge_lse(found), shard.merge_lse(full)
        found = jnp.exp(jnp.minimum(found - full, 0))  # rounding must not show as more than all
        counts = (jnp.arange(count) < length - first)[:, None]
        recall = jnp.where(counts, found, 0).sum(0) / counts.sum(dtype=jnp.float32)
        density = plan.density(listed, start, length, shard=shard)

        poor = recall < budgets.least_recall

        def read_all():
            all_keys = plan.everything(listed, poor, start, length, shard=shard)
            more, more_lse = self._attend(queries, cache, context, start, length, all_keys)
            return jnp.where(poor[:, None], more, out), jnp.where(poor, more_lse, lse)

        out, lse = jax.lax.cond(poor.any(), read_all, lambda: (out, lse))
        report = Report(density=jnp.where(poor, 1.0, density), recall=jnp.where(poor, 1.0, recall))
        return out, lse, report

    def _vote(self, query, cache: PagedKV, context: Context) -> Votes:
        step, angles = context.step, context.voter_angles
        assert angles is not None
        last_q = angles.cos.shape[1]
        index = step.length - last_q + jnp.arange(last_q)
        voters = jnp.take(query, index, axis=0, mode="clip")
        return vote(
            rope.rotate_views(voters, angles, step.query_scale * jnp.float32(self.scale)),
            cache,
            context.layer,
            step.page_table,
            step.start,
            step.length,
            geometry=self.geometry,
            shard=context.shard,
            backend_name=context.backend,
        )

    def _attend(
        self,
        queries: Float[Array, "views T N H"],
        cache: PagedKV,
        context: Context,
        start,
        length,
        listed: plan.SparsePlan | None = None,
    ) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
        """Computes output and log-sum-exp over the keys that this device holds."""
        if self.is_skipped:
            return queries[0], jnp.zeros(queries.shape[1:3])
        return prefill(
            queries,
            cache,
            context.layer,
            context.step.page_table,
            start,
            length,
            geometry=self.geometry,
            plan=listed,
            shard=context.shard,
            backend_name=context.backend,
        )

    def _write_slice(self, cache: PagedKV, context: Context, key, value) -> PagedKV:
        step, keys = context.step, self._rotated_keys(key, context)
        table, start, length = step.page_table, step.start, step.length
        return write_slice(cache, context.layer, keys, value, table, start, length, context.shard)

    def _views(self, query, context: Context) -> Float[Array, "views T N H"]:
        scale = context.step.query_scale * jnp.float32(self.scale)
        return rope.rotate_views(query, context.angles.query, scale)

    def _rotated_keys(self, key, context: Context) -> Float[Array, "T K H"]:
        one_view = rope.Rotary(*(part[None] for part in context.angles.key))
        return rope.rotate_views(key, one_view, context.step.key_scale)[0]


def _on_devices(
    body: Callable[..., tuple[PagedKV, Any, Any]],
    cache: PagedKV,
    rows: tuple[Float[Array, "T _ H"], ...],
    context: Context,
    per_head: tuple[Array, ...] = (),
) -> tuple[PagedKV, Any, Any]:
    """Runs `body(cache, rows, context, per_head)` on each device, with its parts of the arrays.

    Arguments are those of `sequence_parallel.run`; a slice is divided along `seq` if its length
    allows it.
    """

    def here(local, cache, rows, context, per_head):
        return body(cache, rows, dataclasses.replace(context, local=local), per_head)

    split = isinstance(context.step, PrefillStep) and sequence_parallel.splits(len(rows[0]))
    return sequence_parallel.run(here, cache, rows, context, per_head, split=split)


def _kept(context: Context) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
    """Returns the budgets of each head of a layer: numbers of columns and of diagonals."""
    budgets = context.budgets
    assert budgets is not None
    return budgets.vertical[context.layer], budgets.slash[context.layer]
