"""Model runner: weights, cache and compiled steps on a device or mesh."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels.dispatch.backend import Backends, compiler_options
from pallas_kernels.plan import SparsePlan
from qwen_jax.config import ModelConfig
from qwen_jax.distributed import sharding
from qwen_jax.distributed.jax_settings import own_settings
from qwen_jax.engine import sampler
from qwen_jax.engine.inputs import DecodeSlots, SampleStep
from qwen_jax.engine.request import MOST_LOGPROBS
from qwen_jax.engine.sampler import Logprobs, Rows
from qwen_jax.models import kv_cache, kv_transfer, rope
from qwen_jax.models.decoder import Decoder
from qwen_jax.models.families import family
from qwen_jax.models.steps import DecodeStep, PrefillStep
from qwen_jax.sparse.budgets import Budgets, Report
from qwen_jax.sparse.recall import Grid, Survey

Window = tuple[Float[Array, "L T K H"], Float[Array, "L T K H"]]
"""Keys and values of consecutive tokens, outside the cache (`models.kv_transfer`)."""


class Runner:
    """Runs steps one at a time, each with one host synchronisation.

    The cache is donated to every step and comes back from it, so that there is
    never a second one. Shapes depend on the slice and on the sizes given here,
    never on a prompt, and so does the number of programs.

    Args:
        weights: parameter tree, on the device or mesh.
        mesh: where the weights lie; None for one device.
        table_len: pages of the longest sequence.
        vocab_limit: ids from here on are never sampled.
        backend: of each attention operation.
        budgets: of sparse prefill; None where there is none.
        skip_attention: leave it out, selection aside.

    Attributes:
        programs: the compiled steps.
        weights, rotary, cache, seen, budgets: arrays that the steps are given, in their order.

    Raises:
        ValueError: if the weights are not those of this configuration.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights,
        *,
        mesh: Mesh | None = None,
        num_pages: int,
        page: int,
        table_len: int,
        max_seqs: int,
        vocab_limit: int | None,
        backend: Backends,
        budgets: Budgets | None = None,
        skip_attention: bool = False,
    ):
        dtype = jax.tree.leaves(weights)[0].dtype
        # As a plain list, which costs less to hand over at every step than a module's state.
        tensor = mesh.shape["tensor"] if mesh is not None else 1
        self.weights, structure = flatten(
            sharding.padded(config, tensor), weights, dtype, skip_attention=skip_attention
        )
        whole, of_cache, platform = _placements(weights, mesh)
        self._whole, self.mesh = whole, mesh
        empty = functools.partial(kv_cache.init, config, num_pages, page, dtype)
        with own_settings():
            # Where steps return them, or the second step of each kind would be compiled anew.
            self.rotary, self.seen, self.budgets = sharding.put(
                (
                    rope.table(config, table_len * page),
                    jnp.zeros((max_seqs, config.vocab_size), bool),
                    budgets,
                ),
                whole,
            )
            self.cache = jax.jit(empty, out_shardings=of_cache)()
        self._steps = Steps(structure, vocab_limit, backend)
        made = programs(self._steps, whole, of_cache, platform)
        self.programs = Programs(*(_on(mesh, program) for program in made))

    @property
    def num_compilations(self) -> int:
        """Number of programs traced so far."""
        return self._steps.num_traced

    @property
    def is_whole(self) -> bool:
        """True if the arrays that steps overwrite are intact: False after a step that failed or
        was stopped midway.
        """
        state = self.cache, self.seen
        if any(array.is_deleted() for array in jax.tree.leaves(state)):
            return False
        try:
            jax.block_until_ready(state)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    @property
    def cache_dtype(self) -> np.dtype:
        return self.cache.keys.dtype

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache on one device."""
        return sum(each.addressable_data(0).nbytes for each in jax.tree.leaves(self.cache))

    def prefill(self, step: PrefillStep) -> Float32[Array, " V"]:
        """Fills the cache with a slice; returns the logits of its last token, on the device."""
        logits, self.cache = self.programs.prefill(self.weights, self.rotary, self.cache, step)
        return logits

    def prefill_sparse(self, step: PrefillStep) -> tuple[Float32[Array, " V"], Report]:
        """Fills the cache as `prefill`, attending sparsely within the budgets.

        Returns:
            The logits of the last token, and density and recall per head; both on the device.
        """
        logits, self.cache, report = self.programs.prefill_sparse(
            self.weights, self.rotary, self.cache, step, self.budgets
        )
        return logits, report

    def sparse_plan(self, step: PrefillStep, layer: int, head: int) -> SparsePlan:
        """Returns the plan by which `prefill_sparse` reads a slice in one layer and query head.

        The arrays stay on the device and keep a head axis of size 1.
        """
        listed, self.cache = self.programs.sparse_plan(
            self.weights, self.rotary, self.cache, step, self.budgets, layer=layer
        )
        return jax.tree.map(lambda array: array[head : head + 1], listed)

    def survey(self, step: PrefillStep, grid: Grid) -> Survey:
        """Fills the cache with a slice densely; returns the recall at each budget of `grid`."""
        self.cache, surveyed = self.programs.survey(
            self.weights, self.rotary, self.cache, step, grid=grid
        )
        return jax.device_get(surveyed)

    def sample(self, logits: Float32[Array, " V"], choice: SampleStep) -> int:
        """Samples a token from logits that `prefill` returned; -1 if they are not finite."""
        return int(jax.device_get(self.programs.sample(logits, self.seen, choice)))

    def sample_logprobs(
        self, logits: Float32[Array, " V"], choice: SampleStep
    ) -> tuple[int, Logprobs]:
        """Samples as `sample`; also returns the log-probabilities, arrays of one row."""
        token, found = jax.device_get(self.programs.sample_logprobs(logits, self.seen, choice))
        return int(token), found

    def score(self, step: PrefillStep) -> Float32[np.ndarray, "T V"]:
        """Fills the cache with a slice; returns the logits of each of its T tokens, on the host."""
        logits, self.cache = self.programs.score(self.weights, self.rotary, self.cache, step)
        return jax.device_get(logits)[: int(step.length)]

    def score_sparse(self, step: PrefillStep) -> tuple[Float[Array, "T D"], Report]:
        """Fills the cache as `prefill_sparse`; returns the hidden state of every token.

        The hidden states, padding included, are the input of `logits`.
        """
        hidden, self.cache, report = self.programs.score_sparse(
            self.weights, self.rotary, self.cache, step, self.budgets
        )
        return hidden, report

    def logits(
        self, hidden: Float[Array, "T D"], start: int, rows: int
    ) -> Float32[np.ndarray, "n V"]:
        """Computes the logits of the tokens of a slice from `start` on, at most `rows` of them."""
        first = min(start, len(hidden) - rows)
        found = self.programs.logits(self.weights, hidden, np.int32(first), rows=rows)
        return jax.device_get(found)[start - first :]

    def place(self, roster: DecodeSlots) -> DecodeSlots:
        """Puts the decode slots on the device, to be reused until they change."""
        return sharding.put(roster, self._whole)

    def decode(self, sampling: Rows, step: DecodeStep) -> Int[np.ndarray, " B"]:
        """Decodes one token in every row; -1 where the logits are not finite."""
        token, self.cache, self.seen = self.programs.decode(
            self.weights, self.rotary, self.cache, self.seen, sampling, step
        )
        return jax.device_get(token)

    def decode_logprobs(
        self, sampling: Rows, step: DecodeStep
    ) -> tuple[Int[np.ndarray, " B"], Logprobs]:
        """Decodes as `decode`; also returns the log-probabilities of every row."""
        token, found, self.cache, self.seen = self.programs.decode_logprobs(
            self.weights, self.rotary, self.cache, self.seen, sampling, step
        )
        return jax.device_get((token, found))

    def extract_kv(self, page_table: Int[np.ndarray, " P"], start: int, size: int) -> Window:
        """Copies keys and values of `size` tokens from `start` out of the cache, on the device."""
        return self.programs.extract_kv(self.cache, page_table, np.int32(start), size=size)

    def insert_kv(
        self, window: Window, page_table: Int[np.ndarray, " P"], start: int, length: int
    ) -> None:
        """Writes the first `length` tokens of a window into the cache, from `start` on."""
        keys, values = window
        self.cache = self.programs.insert_kv(
            self.cache, keys, values, page_table, np.int32(start), np.int32(length)
        )

    def copy_page(self, source: int, target: int) -> None:
        """Copies a page of the cache, `source`, onto the page `target`."""
        self.cache = self.programs.copy_page(self.cache, np.int32(source), np.int32(target))

    def window(self, size: int) -> jax.ShapeDtypeStruct:
        """Returns shape, dtype and placement of the two arrays that `insert_kv` takes for `size`
        tokens.
        """
        layers, heads, _, _, head_dim = self.cache.keys.shape
        placed = self._whole if self.mesh is None else kv_transfer.placement(self.mesh, size)
        shape = layers, size, heads, head_dim
        return jax.ShapeDtypeStruct(shape, self.cache.keys.dtype, sharding=placed)

    def set_seen_tokens(self, row: int, prompt: tuple[int, ...]) -> None:
        """Sets the tokens that the repetition penalty of a row applies to: those of the prompt."""
        mask = np.zeros(self.seen.shape[1], bool)
        mask[np.asarray(prompt)] = True
        self.seen = self.programs.set_seen_tokens(self.seen, np.asarray(row, np.int32), mask)


class Steps:
    """Functions of the steps, before compilation.

    They are separate from the runner and hold no arrays: compiled functions refer to what
    they were made of, and a reference cycle through the cache would keep it alive after
    its engine until the garbage collector runs.
    """

    def __init__(self, structure, vocab_limit: int | None, backend: Backends):
        self.num_traced = 0
        self._graph, self._tree = structure
        self._vocab_limit = vocab_limit
        self._backend = backend

    def prefill(self, weights, rotary, cache, step):
        return self._model(weights).prefill(cache, step, rotary, backend=self._backend)

    def prefill_sparse(self, weights, rotary, cache, step, budgets):
        return self._model(weights).prefill_sparse(
            cache, step, rotary, budgets, backend=self._backend
        )

    def sparse_plan(self, weights, rotary, cache, step, budgets, layer):
        return self._model(weights).sparse_plan(
            cache, step, rotary, budgets, layer, backend=self._backend
        )

    def survey(self, weights, rotary, cache, step, grid):
        return self._model(weights).survey(cache, step, rotary, grid, backend=self._backend)

    def sample(self, logits, seen, choice):
        self.num_traced += 1
        rows, seen = choice.sampling, seen[choice.row][None]
        return sampler.sample(logits[None], rows, seen, vocab_limit=self._vocab_limit)[0]

    def sample_logprobs(self, logits, seen, choice):
        token = self.sample(logits, seen, choice)
        return token, sampler.logprobs(logits[None], token[None], count=MOST_LOGPROBS)

    def score(self, weights, rotary, cache, step):
        return self._model(weights).score(cache, step, rotary, backend=self._backend)

    def score_sparse(self, weights, rotary, cache, step, budgets):
        return self._model(weights).score_sparse(
            cache, step, rotary, budgets, backend=self._backend
        )

    def logits(self, weights, hidden, first, rows):
        return self._model(weights).logits(jax.lax.dynamic_slice_in_dim(hidden, first, rows))

    def decode(self, weights, rotary, cache, seen, sampling, step):
        _, token, cache, seen = self._decode(weights, rotary, cache, seen, sampling, step)
        return token, cache, seen

    def decode_logprobs(self, weights, rotary, cache, seen, sampling, step):
        logits, token, cache, seen = self._decode(weights, rotary, cache, seen, sampling, step)
        return token, sampler.logprobs(logits, token, count=MOST_LOGPROBS), cache, seen

    def _decode(self, weights, rotary, cache, seen, sampling, step):
        logits, cache = self._model(weights).decode(cache, step, rotary, backend=self._backend)
        rows = sampling._replace(position=step.positions + 1)
        seen = _see(seen, step, rows)
        token = sampler.sample(logits, rows, seen, vocab_limit=self._vocab_limit)
        return logits, token, cache, seen

    def set_seen_tokens(self, seen, row, mask):
        self.num_traced += 1
        return seen.at[row].set(mask)

    def extract_kv(self, cache, page_table, start, size):
        self.num_traced += 1
        return kv_transfer.extract_kv(cache, page_table, start, size=size)

    def insert_kv(self, cache, keys, values, page_table, start, length):
        self.num_traced += 1
        return kv_transfer.insert_kv(cache, keys, values, page_table, start, length)

    def copy_page(self, cache, source, target):
        self.num_traced += 1
        return kv_transfer.copy_page(cache, source, target)

    def _model(self, weights) -> Decoder:
        # Runs when a step is traced, which is once for each program.
        self.num_traced += 1
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, weights))


class Programs(NamedTuple):
    """Functions of `Steps`, each jitted."""

    prefill: Any
    prefill_sparse: Any
    sparse_plan: Any
    survey: Any
    sample: Any
    sample_logprobs: Any
    score: Any
    score_sparse: Any
    logits: Any
    decode: Any
    decode_logprobs: Any
    set_seen_tokens: Any
    extract_kv: Any
    insert_kv: Any
    copy_page: Any


def programs(steps: Steps, whole: Sharding, of_cache: Sharding, platform: str) -> Programs:
    """Jits every step, with the arguments that it donates and the placement of its results.

    Args:
        steps: functions to compile.
        whole: sharding of small arrays, replicated on all devices.
        of_cache: sharding of the cache.
        platform: platform of the devices: "cpu", "gpu" or "tpu".
    """

    def jit(step, outputs, donated: tuple[str, ...] = ("cache",), static=None):
        return jax.jit(
            step,
            donate_argnames=donated,
            static_argnames=static,
            out_shardings=outputs,
            compiler_options=compiler_options(platform),
        )

    return Programs(
        prefill=jit(steps.prefill, (whole, of_cache)),
        prefill_sparse=jit(steps.prefill_sparse, (whole, of_cache, whole)),
        sparse_plan=jit(steps.sparse_plan, (whole, of_cache), static="layer"),
        survey=jit(steps.survey, (of_cache, whole), static="grid"),
        sample=jit(steps.sample, whole, donated=()),
        sample_logprobs=jit(steps.sample_logprobs, whole, donated=()),
        score=jit(steps.score, (whole, of_cache)),
        score_sparse=jit(steps.score_sparse, (whole, of_cache, whole)),
        logits=jit(steps.logits, whole, donated=(), static="rows"),
        decode=jit(steps.decode, (whole, of_cache, whole), ("cache", "seen")),
        decode_logprobs=jit(
            steps.decode_logprobs, (whole, whole, of_cache, whole), ("cache", "seen")
        ),
        set_seen_tokens=jit(steps.set_seen_tokens, whole, ("seen",)),
        extract_kv=jit(steps.extract_kv, None, donated=(), static="size"),
        insert_kv=jit(steps.insert_kv, of_cache),
        copy_page=jit(steps.copy_page, of_cache),
    )


def _placements(weights, mesh: Mesh | None):
    """Returns the sharding of small arrays, that of the cache, and the platform."""
    leaf = jax.tree.leaves(weights)[0]
    (platform,) = {device.platform for device in leaf.devices()}
    if mesh is None:
        (device,) = leaf.devices()
        return SingleDeviceSharding(device), SingleDeviceSharding(device), platform
    of_cache = NamedSharding(mesh, sharding.RULES.spec(kv_cache.AXES))
    return NamedSharding(mesh, PartitionSpec()), of_cache, platform


def _on(mesh: Mesh | None, function):
    """Wraps a function so that it is traced and called with the mesh and JAX settings set."""

    @functools.wraps(function)
    def call(*args, **keywords):
        with own_settings(), contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return function(*args, **keywords)

    return call


def flatten(config: ModelConfig, weights, dtype, *, skip_attention: bool = False):
    """Returns the parameters as a list, and the structure that rebuilds a model from them.

    Raises:
        ValueError: if the weights are not those of this configuration.
    """
    module = family(config.model_type).module
    model = nnx.eval_shape(
        lambda: module(config, key=jax.random.key(0), dtype=dtype, skip_attention=skip_attention)
    )
    graph, state = nnx.split(model)
    expected = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(state))
    actual = jax.tree.map(lambda leaf: leaf.shape, weights)
    if actual != expected:
        raise ValueError(f"the weights have shapes {actual}, the configuration asks for {expected}")
    nnx.replace_by_pure_dict(state, weights)
    leaves, structure = jax.tree.flatten(state)
    return leaves, (graph, structure)


def _see(seen: Bool[Array, "B V"], step: DecodeStep, rows: Rows) -> Bool[Array, "B V"]:
    """Marks the step's tokens as seen, in rows that have a repetition penalty."""

    def see():
        B = seen.shape[0]
        # Rows that need no mark point out of range, where `drop` leaves them.
        row = jnp.where(rows.penalty != 1, jnp.arange(B), B)
        return seen.at[row, step.tokens].set(True, mode="drop")

    return jax.lax.cond((rows.penalty != 1).any(), see, lambda: seen)
