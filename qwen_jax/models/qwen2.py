"""Block and Qwen2: tokens + step -> logits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch.backend import Choice
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import SparsePlan
from qwen_jax.config import ModelConfig
from qwen_jax.models import rope, sequence_parallel
from qwen_jax.models.attention import Attention
from qwen_jax.models.layers import Embedding, GatedMLP, Projection, RMSNorm
from qwen_jax.sparse.budgets import Budgets, Report
from qwen_jax.sparse.recall import Grid, Survey


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStep:
    """A slice of one sequence's prompt.

    Attributes:
        tokens: the slice, padded to its fixed shape.
        start: position of the first token.
        length: tokens that count.
        page_table: pages of the sequence, in order; 0 where none is needed yet.
        query_scale: temperature factor on queries, beside `1 / sqrt(head_dim)`.
        key_scale: temperature factor on keys before they are cached.
    """

    tokens: Int[Array, " T"]
    start: Int[Array, ""]
    length: Int[Array, ""]
    page_table: Int[Array, " P"]
    query_scale: Float[Array, ""]
    key_scale: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """The next token of each of B sequences.

    Attributes:
        positions: position of each token; -1 marks an idle row.
        page_table: pages of each sequence, in order; 0 where none is needed yet.
        query_scale: temperature factor on queries, beside `1 / sqrt(head_dim)`.
        key_scale: temperature factor on keys before they are cached.
    """

    tokens: Int[Array, " B"]
    positions: Int[Array, " B"]
    page_table: Int[Array, "B P"]
    query_scale: Float[Array, " B"]
    key_scale: Float[Array, " B"]


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.attention_norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "T D"], attend) -> tuple[Float[Array, "T D"], Any]:
        """`attend(attention, normed)` returns the attention's output and what to hand on."""
        attended, state = attend(self.attention, self.attention_norm(x))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), state


class Qwen2(nnx.Module):
    """Qwen2 decoder whose blocks are stacked on a leading layer axis and looped over."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, dtype=jnp.bfloat16):
        def block(key):
            return Block(config, rngs=nnx.Rngs(key), dtype=dtype)

        rest, blocks = jax.random.split(key)
        rngs = nnx.Rngs(rest)
        D, V = config.embed_dim, config.vocab_size + config.vocab_padding
        self.embed = Embedding(V, D, rngs=rngs, dtype=dtype)
        one = nnx.graphdef(nnx.eval_shape(lambda: block(blocks)))
        keys = jax.random.split(blocks, config.num_layers)
        self.blocks = nnx.merge(one, jax.vmap(lambda key: nnx.state(block(key)))(keys))
        self.norm = RMSNorm(D, eps=config.norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.head = Projection("TD,DV->TV", rngs=rngs, dtype=dtype, embed=D, vocab=V)
        self.config = config

    def prefill(
        self, cache: PagedKV, step: PrefillStep, rotary: rope.Table, *, backend: Choice = None
    ) -> tuple[Float[Array, " V"], PagedKV]:
        """Logits of the slice's last token, in float32, and the cache with the slice written.

        DONATES nothing itself: callers donate `cache` when they jit.

        Args:
            rotary: `rope.table` of the configuration.
            backend: of the attention operations, or None for the preferred ones.
        """
        x, cache = self._slice(cache, step, rotary, backend, skip=1)
        x, cache = self._last_token(x, cache, step, rotary, backend)
        return self.logits(x)[0], cache

    def prefill_sparse(
        self,
        cache: PagedKV,
        step: PrefillStep,
        rotary: rope.Table,
        budgets: Budgets,
        *,
        backend: Choice = None,
    ) -> tuple[Float[Array, " V"], PagedKV, Report]:
        """As `prefill`, with sparse attention; the report leaves out the last layer.

        That one reads a single token, densely.
        """
        x, cache, report = self._sparse_slice(cache, step, rotary, budgets, backend)
        x, cache = self._last_token(x, cache, step, rotary, backend)
        return self.logits(x)[0], cache, report

    def sparse_plan(
        self,
        cache: PagedKV,
        step: PrefillStep,
        rotary: rope.Table,
        budgets: Budgets,
        layer: int,
        *,
        backend: Choice = None,
    ) -> tuple[SparsePlan, PagedKV]:
        """The plan by which `prefill_sparse` reads a slice in one layer, before the guard.

        Writes the slice into that layer and those before it.
        """
        votes = self._votes(step, rotary, budgets.last_q)
        angles = self._angles(step, rotary)

        def attend(attention, x, cache, layer):
            return attention.prefill_sparse(x, cache, layer, step, angles, votes, budgets, backend)[
                :2
            ]

        skip = self.config.num_layers - layer
        x, cache = self._layers(step.tokens, cache, attend, skip=skip)
        block = self._block(layer)
        return block.attention.sparse_plan(
            block.attention_norm(x),
            cache,
            jnp.int32(layer),
            step,
            angles,
            votes,
            budgets,
            backend,
        )

    def survey(
        self,
        cache: PagedKV,
        step: PrefillStep,
        rotary: rope.Table,
        grid: Grid,
        *,
        backend: Choice = None,
    ) -> tuple[PagedKV, Survey]:
        """The cache with a slice written, densely, and a survey of all its layers."""
        votes = self._votes(step, rotary, grid.last_q)
        angles = self._angles(step, rotary)

        def attend(attention, x, state, layer):
            cache, surveys = state
            out, cache, part = attention.survey(x, cache, layer, step, angles, votes, grid, backend)
            return out, (cache, jax.tree.map(lambda a, b: a.at[layer].set(b), surveys, part))

        L, N = self.config.num_layers, self.config.num_heads
        table = jnp.zeros((L, N, len(grid.vertical) + 1, len(grid.slash) + 1))
        empty = Survey(table, table, table[:, :, 0], table[:, :, 0, 0])
        _, state = self._layers(step.tokens, (cache, empty), attend, skip=0)
        return state

    def score(
        self, cache: PagedKV, step: PrefillStep, rotary: rope.Table, *, backend: Choice = None
    ) -> tuple[Float[Array, "T V"], PagedKV]:
        """As `prefill`, with the logits of every token; rows of padding mean nothing."""
        x, cache = self._slice(cache, step, rotary, backend, skip=0)
        return self.logits(x), cache

    def score_sparse(
        self,
        cache: PagedKV,
        step: PrefillStep,
        rotary: rope.Table,
        budgets: Budgets,
        *,
        backend: Choice = None,
    ) -> tuple[Float[Array, "T D"], PagedKV, Report]:
        """As `prefill_sparse`, with what `logits` takes of every token.

        Those of each slice can be more than a device holds. All tokens are read by the last layer
        as `prefill_sparse` has it read the one: densely.
        """
        x, cache, report = self._sparse_slice(cache, step, rotary, budgets, backend)
        layer, angles = jnp.int32(self.config.num_layers - 1), self._angles(step, rotary)

        def attend(attention, x):
            return attention.prefill(x, cache, layer, step, angles, backend)

        x, cache = self._block(layer)(x, attend)
        return x, cache, report

    def decode(
        self, cache: PagedKV, step: DecodeStep, rotary: rope.Table, *, backend: Choice = None
    ) -> tuple[Float[Array, "B V"], PagedKV]:
        """Logits of one token of each sequence and the cache with those tokens written."""
        angles = rope.angles(self.config, rotary, jnp.maximum(step.positions, 0))

        def attend(attention, x, cache, layer):
            return attention.decode(x, cache, layer, step, angles, backend)

        x, cache = self._layers(step.tokens, cache, attend, skip=0, sliced=False)
        return self.logits(x), cache

    def logits(self, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Scores of every token, in float32."""
        x = self.norm(x)
        if self.config.tie_embeddings:
            scores = self.embed.logits(x)
        else:
            kernel = self.head.kernel[...]
            scores = jnp.einsum(self.head.equation, x, kernel, preferred_element_type=jnp.float32)
        return scores[:, : self.config.vocab_size] if self.config.vocab_padding else scores

    def _slice(self, cache, step, rotary, backend, *, skip: int):
        angles = self._angles(step, rotary)

        def attend(attention, x, cache, layer):
            return attention.prefill(x, cache, layer, step, angles, backend)

        return self._layers(step.tokens, cache, attend, skip=skip)

    def _sparse_slice(self, cache, step, rotary, budgets: Budgets, backend):
        """A slice after all layers but the last, the cache, and how it was done."""
        votes = self._votes(step, rotary, budgets.last_q)
        angles = self._angles(step, rotary)

        def attend(attention, x, state, layer):
            cache, report = state
            out, cache, part = attention.prefill_sparse(
                x, cache, layer, step, angles, votes, budgets, backend
            )
            return out, (cache, jax.tree.map(lambda a, b: a.at[layer].set(b), report, part))

        everything = jnp.ones((max(self.config.num_layers - 1, 1), self.config.num_heads))
        state = cache, Report(everything, everything)
        x, (cache, report) = self._layers(step.tokens, state, attend, skip=1)
        return x, cache, report

    def _angles(self, step: PrefillStep, rotary: rope.Table) -> rope.Angles:
        positions = step.start + jnp.arange(step.tokens.shape[0], dtype=jnp.int32)
        return rope.angles(self.config, rotary, positions)

    def _votes(self, step: PrefillStep, rotary: rope.Table, last_q: int) -> rope.Rotary:
        positions = step.start + step.length - last_q + jnp.arange(last_q)
        return rope.selection_angles(self.config, rotary, jnp.maximum(positions, 0))

    def _last_token(self, x, cache, step, rotary, backend):
        """The last layer caches the keys of the whole slice; what follows needs one token."""
        layer = jnp.int32(self.config.num_layers - 1)
        block = self._block(layer)
        angles = self._angles(step, rotary)
        cache = block.attention.write_slice(block.attention_norm(x), cache, layer, step, angles)

        token = DecodeStep(
            tokens=jax.lax.dynamic_slice_in_dim(step.tokens, step.length - 1, 1),
            positions=(step.start + step.length - 1)[None],
            page_table=step.page_table[None],
            query_scale=step.query_scale[None],
            key_scale=step.key_scale[None],
        )
        angles = rope.angles(self.config, rotary, token.positions)
        x = sequence_parallel.row(x, step.length - 1)

        def attend(attention, x):
            return attention.read_tokens(x, cache, layer, token, angles, backend)

        return block(x, attend)

    def _block(self, layer) -> Block:
        graph, weights = nnx.split(self.blocks)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[layer], weights))

    def _layers(self, tokens, state, attend, *, skip: int, sliced: bool = True):
        """All layers, but for the last `skip`; `state` is the cache and what goes with it.

        Args:
            sliced: whether the tokens are a slice of one sequence, which a mesh divides.
        """
        split = sliced and sequence_parallel.splits(len(tokens))

        def body(layer, carry):
            x, state = carry
            x, state = self._block(layer)(
                x, lambda attention, x: attend(attention, x, state, layer)
            )
            return sequence_parallel.place(x, split=split), state

        x = sequence_parallel.place(self.embed(tokens), split=split)
        return jax.lax.fori_loop(0, self.config.num_layers - skip, body, (x, state))
