"""Block and Decoder: tokens + step -> logits."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.dispatch.backend import Choice
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import SparsePlan
from qwen_jax.config import ModelConfig
from qwen_jax.models import rope, sequence_parallel
from qwen_jax.models.attention import Attention, Context
from qwen_jax.models.layers import Embedding, GatedMLP, Projection, RMSNorm
from qwen_jax.models.steps import DecodeStep, PrefillStep
from qwen_jax.sparse.budgets import Budgets, Report
from qwen_jax.sparse.recall import Grid, Survey


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, attention: Attention, *, rngs: nnx.Rngs, dtype):
        self.attention_norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
        self.attention = attention
        self.mlp_norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "T D"], attend) -> tuple[Float[Array, "T D"], Any]:
        """Applies attention and MLP with residual connections.

        Args:
            attend: `attend(attention, normed)` returns the attention's output and a state, which
                is returned unchanged.
        """
        attended, state = attend(self.attention, self.attention_norm(x))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), state


class Decoder(nnx.Module):
    """Decoder whose blocks are stacked on a leading layer axis and looped over.

    Args:
        skip_attention: leave attention out, to measure what all else takes.

    Attributes:
        attention: the class of a block's attention, which a family of models may replace.
    """

    attention: ClassVar[type[Attention]] = Attention

    def __init__(
        self,
        config: ModelConfig,
        *,
        key: jax.Array,
        dtype=jnp.bfloat16,
        skip_attention: bool = False,
    ):
        def block(key):
            rngs = nnx.Rngs(key)
            attention = self.attention(
                config, rngs=rngs, dtype=dtype, skip_attention=skip_attention
            )
            return Block(config, attention, rngs=rngs, dtype=dtype)

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
        """Computes float32 logits of the slice's last token; returns the cache with the slice.

        Donates nothing itself: callers donate `cache` when they jit.

        Args:
            rotary: `rope.table` of the configuration.
            backend: backends of the attention operations; None for the preferred ones.
        """
        context = self._context(step, rotary, backend)
        x, cache = self._layers(context, cache, Attention.prefill, skip=1)
        x, cache = self._last_token(x, cache, context, rotary)
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
        """Prefills as `prefill`, with sparse attention in all layers but the last.

        The last layer computes a single token, densely; the report, arrays [L - 1, N], leaves it
        out.
        """
        context = self._sparse_context(step, rotary, budgets, backend)
        x, cache, report = self._sparse_slice(cache, context)
        x, cache = self._last_token(x, cache, context, rotary)
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
        """Returns the plan of `prefill_sparse` in one layer, before the guard of `least_recall`.

        Writes the slice into the cache of that layer and those before it.
        """
        context = self._sparse_context(step, rotary, budgets, backend)

        def attend(attention, x, cache, context):
            return attention.prefill_sparse(x, cache, context)[:2]

        x, cache = self._layers(context, cache, attend, skip=self.config.num_layers - layer)
        block = self._block(layer)
        context = context.at(jnp.int32(layer))
        return block.attention.sparse_plan(block.attention_norm(x), cache, context)

    def survey(
        self,
        cache: PagedKV,
        step: PrefillStep,
        rotary: rope.Table,
        grid: Grid,
        *,
        backend: Choice = None,
    ) -> tuple[PagedKV, Survey]:
        """Prefills a slice densely; returns the cache and a survey of all layers."""
        voter_angles = self._voter_angles(step, rotary, grid.last_q)
        context = self._context(step, rotary, backend, voter_angles=voter_angles)

        def attend(attention, x, state, context):
            cache, surveys = state
            out, cache, part = attention.survey(x, cache, context, grid)
            return out, (cache, _put(surveys, context.layer, part))

        L, N = self.config.num_layers, self.config.num_heads
        table = jnp.zeros((L, N, len(grid.vertical) + 1, len(grid.slash) + 1))
        empty = Survey(table, table, table[:, :, 0], table[:, :, 0, 0])
        _, state = self._layers(context, (cache, empty), attend, skip=0)
        return state

    def score(
        self, cache: PagedKV, step: PrefillStep, rotary: rope.Table, *, backend: Choice = None
    ) -> tuple[Float[Array, "T V"], PagedKV]:
        """Prefills as `prefill`; returns float32 logits of every token, arbitrary for padding."""
        context = self._context(step, rotary, backend)
        x, cache = self._layers(context, cache, Attention.prefill, skip=0)
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
        """Prefills as `prefill_sparse`; returns the hidden state of every token, for `logits`.

        The logits of all tokens of a slice may not fit on a device. The last layer computes all
        tokens densely, as `prefill_sparse` computes the last one.
        """
        context = self._sparse_context(step, rotary, budgets, backend)
        x, cache, report = self._sparse_slice(cache, context)
        last = context.at(jnp.int32(self.config.num_layers - 1))
        block = self._block(last.layer)
        x, cache = block(x, lambda attention, x: attention.prefill(x, cache, last))
        return x, cache, report

    def decode(
        self, cache: PagedKV, step: DecodeStep, rotary: rope.Table, *, backend: Choice = None
    ) -> tuple[Float[Array, "B V"], PagedKV]:
        """Computes float32 logits of one token of each sequence; returns the cache with them."""
        angles = rope.angles(self.config, rotary, jnp.maximum(step.positions, 0))
        context = Context(step=step, angles=angles, backend=backend)
        x, cache = self._layers(context, cache, Attention.decode, skip=0)
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

    def _context(
        self, step: PrefillStep, rotary: rope.Table, backend: Choice, **more: Any
    ) -> Context:
        positions = step.start + jnp.arange(step.tokens.shape[0], dtype=jnp.int32)
        angles = rope.angles(self.config, rotary, positions)
        return Context(step=step, angles=angles, backend=backend, **more)

    def _sparse_context(
        self, step: PrefillStep, rotary: rope.Table, budgets: Budgets, backend: Choice
    ) -> Context:
        voter_angles = self._voter_angles(step, rotary, budgets.last_q)
        return self._context(step, rotary, backend, voter_angles=voter_angles, budgets=budgets)

    def _voter_angles(self, step: PrefillStep, rotary: rope.Table, last_q: int) -> rope.Rotary:
        positions = step.start + step.length - last_q + jnp.arange(last_q)
        return rope.selection_angles(self.config, rotary, jnp.maximum(positions, 0))

    def _sparse_slice(self, cache: PagedKV, context: Context):
        """Runs a slice through all layers but the last.

        Returns:
            Hidden states [T, D], the cache, and density and recall of each layer and head.
        """

        def attend(attention, x, state, context):
            cache, report = state
            out, cache, part = attention.prefill_sparse(x, cache, context)
            return out, (cache, _put(report, context.layer, part))

        everything = jnp.ones((max(self.config.num_layers - 1, 1), self.config.num_heads))
        state = cache, Report(everything, everything)
        x, (cache, report) = self._layers(context, state, attend, skip=1)
        return x, cache, report

    def _last_token(self, x, cache: PagedKV, context: Context, rotary: rope.Table):
        """Runs the last layer: caches keys of the whole slice, but computes its last token only.

        Returns:
            The token's hidden state [1, D], and the cache.
        """
        context = context.at(jnp.int32(self.config.num_layers - 1))
        block, step = self._block(context.layer), context.step
        cache = block.attention.write(block.attention_norm(x), cache, context)

        token = DecodeStep(
            tokens=jax.lax.dynamic_slice_in_dim(step.tokens, step.length - 1, 1),
            positions=(step.start + step.length - 1)[None],
            page_table=step.page_table[None],
            query_scale=step.query_scale[None],
            key_scale=step.key_scale[None],
        )
        angles = rope.angles(self.config, rotary, token.positions)
        x = sequence_parallel.row(x, step.length - 1)
        context = Context(layer=context.layer, step=token, angles=angles, backend=context.backend)
        return block(x, lambda attention, x: attention.read(x, cache, context))

    def _block(self, layer) -> Block:
        graph, weights = nnx.split(self.blocks)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[layer], weights))

    def _layers(self, context: Context, state, attend, *, skip: int):
        """Runs the tokens of a step through all layers but the last `skip`.

        Args:
            state: loop state beside the hidden states: the cache, alone or in a tuple.
            attend: `attend(attention, x, state, context)` returns the attention's output and state.

        Returns:
            Hidden states [T, D], and the state after the layers.
        """
        tokens = context.step.tokens
        split = isinstance(context.step, PrefillStep) and sequence_parallel.splits(len(tokens))

        def body(layer, carry):
            x, state = carry
            x, state = self._block(layer)(
                x, lambda attention, x: attend(attention, x, state, context.at(layer))
            )
            return sequence_parallel.place(x, split=split), state

        x = sequence_parallel.place(self.embed(tokens), split=split)
        return jax.lax.fori_loop(0, self.config.num_layers - skip, body, (x, state))


def _put(stacked, layer, one):
    """Sets the arrays of one layer in arrays of all layers."""
    return jax.tree.map(lambda a, b: a.at[layer].set(b), stacked, one)
