"""Engine: continuous batching of requests over one model, one cache and few compiled steps."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float32

from pallas_kernels.check import Shape
from pallas_kernels.dispatch import backend
from pallas_kernels.plan import SparsePlan
from pallas_kernels.programs import DENSE, PROGRAMS
from qwen_jax.config import ConfigError, ModelConfig
from qwen_jax.distributed import multihost
from qwen_jax.distributed.jax_settings import own_settings
from qwen_jax.engine import first_contact, inputs, interrupts
from qwen_jax.engine.layout import EngineConfig, EngineLayout
from qwen_jax.engine.model_runner import Runner, Window
from qwen_jax.engine.observer import Kind, Observer, Step
from qwen_jax.engine.page_pool import Pages
from qwen_jax.engine.request import (
    EngineError,
    Event,
    Finish,
    Prefix,
    Request,
    RequestError,
    Sampling,
    Sequence,
    Sparseness,
    TokenLogprobs,
    check_ids,
)
from qwen_jax.engine.sampler import Logprobs
from qwen_jax.engine.scheduler import Decode, Scheduler, Slice
from qwen_jax.models.steps import PrefillStep
from qwen_jax.sparse.budgets import Report
from qwen_jax.sparse.recall import Grid, Survey

_GREEDY = Sampling()
WINDOW_UNIT = 1024
"""Tokens to a multiple of which `Engine.take` pads, so that few programs serve all lengths."""
_SCORE_BYTES = 1 << 28  # logits that one slice of `score` may hold, if there is a slice so small
_DEAD = (
    "this engine was stopped in the middle of a step, and what it kept is lost: "
    "build another engine and add its requests again"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens `start` to `stop` of a prompt, whose keys and values are stored elsewhere.

    Attributes:
        load: returns the keys and values in the given shape, dtype and placement, which are
            those of `Engine.window`.
    """

    start: int
    stop: int
    load: Callable[[jax.ShapeDtypeStruct], Window]


class Runs:
    """Answers requests to their end, for an engine and for replicas alike."""

    def run(self: Any, requests: Iterable[Request]) -> list[list[int]]:
        """Returns the answers to requests as token ids, for callers with nothing else to serve.

        Raises:
            RequestError: if one of them cannot be served or fails.
        """
        requests = list(requests)
        for request in requests:
            self.check(request)
        first = self._num_requests
        try:
            answers: dict[int, list[int]] = {self.add(request): [] for request in requests}
            while self.busy:
                for event in self.step():
                    if event.error is not None:
                        raise RequestError(f"request {event.request_id}: {event.error}")
                    answers.get(event.request_id, []).extend(event.tokens)
            return list(answers.values())
        finally:
            self.drop(range(first, self._num_requests))


class Engine(Runs):
    """Serves requests by continuous batching; knows token ids, never text.

    A step is done as a whole, whenever Ctrl-C comes: that waits for its end, and the events are
    in what the next step returns. What else stops a step leaves its requests where they were; if
    that cannot be, the engine is dead, and all that it is asked for raises `EngineError`.

    Args:
        model: the configuration that the weights belong to.
        weights: parameter tree on the device, nested dicts as in `params.abstract`.
        make_runner: makes what runs the model, from the arguments of `Runner`.

    Attributes:
        layout: sizes of pages, slices and cache.
        pages: of the cache: how many there are, are used and are free.
        runner: the compiled steps and the cache.
        num_prefilled: prompt tokens computed so far; shared pages do not count.

    Raises:
        ConfigError: if the configuration asks for what the model or device cannot do.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights,
        config: EngineConfig,
        *,
        make_runner: Callable[..., Runner] | None = None,
    ):
        self._model = model
        self._config = config
        self._mesh = _mesh_of(weights)
        self._device = next(iter(jax.tree.leaves(weights)[0].devices()))
        if config.vocab_limit is not None and config.vocab_limit > model.vocab_size:
            raise ConfigError(
                f"vocab_limit={config.vocab_limit} exceeds the {model.vocab_size} tokens "
                "of the model: is this its tokenizer?"
            )
        dtype = str(jax.tree.leaves(weights)[0].dtype)
        self._backend, layout = kernels(
            model, config, device=self._device, dtype=dtype, mesh=self._mesh
        )
        self._attended = {
            "kind": self._device.device_kind,
            "head_dim": model.head_dim,
            "dtype": dtype,
        }
        self.layout = layout
        self._page, self._table_len = layout.page, layout.table_len
        self.pages = Pages(layout.num_pages)
        # A function of its own: a method would tie engine and scheduler into a circle, and with
        # it the cache's memory to the garbage collector.
        self._scales = functools.partial(_scales, model, config.vllm_parity)
        self._scheduler = Scheduler(
            self.pages,
            layout=layout,
            max_seqs=config.max_seqs,
            dense_tail=config.dense_tail,
            whole_slices=config.whole_slices,
            scales=self._scales,
        )
        budgets = None
        if config.sparse is not None:
            with own_settings():
                budgets = layout.budgets(config.sparse, least_recall=config.least_recall)
        self.runner = (make_runner or Runner)(
            model,
            weights,
            mesh=self._mesh,
            num_pages=layout.num_pages,
            page=self._page,
            table_len=self._table_len,
            max_seqs=config.max_seqs,
            vocab_limit=config.vocab_limit,
            backend=self._backend,
            budgets=budgets,
            skip_attention=not config.attention,
        )
        self._sequences: dict[int, Sequence] = {}
        self._events: list[Event] = []  # of steps that were interrupted when they were done
        self._is_dead = False
        self._prefix: Prefix | None = None
        self._num_requests = 0
        self._slots: tuple[tuple[int, ...], inputs.DecodeSlots] | None = None
        self.num_prefilled = 0
        self._observer: Observer | None = None

    @property
    def busy(self) -> bool:
        """True if `step` has something to do."""
        return self._scheduler.busy or bool(self._events)

    @property
    def slices(self) -> tuple[int, ...]:
        """Slice lengths in tokens that prefill is compiled for, largest first."""
        return self.layout.slices

    @property
    def restored(self) -> tuple[int, ...]:
        """Tokens that `restore` put into the cache; () for none."""
        return () if self._prefix is None else self._prefix.tokens

    @property
    def request_ids(self) -> tuple[int, ...]:
        """Requests that have not ended, in the order in which they came."""
        return tuple(self._sequences)

    @property
    def free_rows(self) -> tuple[int, ...]:
        """Rows of the decode step that no request has, ascending."""
        return tuple(sorted(self._scheduler.free_rows))

    @property
    def max_seqs(self) -> int:
        """Maximum number of requests that run at once."""
        return self._config.max_seqs

    @property
    def num_devices(self) -> int:
        """Number of devices of the engine."""
        return 1 if self._mesh is None else self._mesh.size

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache on one device."""
        return self.runner.cache_bytes

    @property
    def num_compilations(self) -> int:
        """Number of programs compiled so far: bounded by the slices, whatever the requests."""
        return self.runner.num_compilations

    def summary(self) -> str:
        """Returns one short line: devices, kernels, dtype, and why faster kernels are not used."""
        kernels = self._backend.prefill if len(set(self._backend)) == 1 else self._backend
        return (
            f"{self._device.device_kind}, {self._devices()}; {kernels} kernels{self._why_not()}; "
            f"{self.runner.cache_dtype}"
        )

    def describe(self) -> str:
        """Returns one line on devices, kernels, dtype, pages, slices and capacity."""
        slices = "/".join(map(str, self.layout.slices))
        return (
            f"{self._device.platform} ({self._device.device_kind}), {self._devices()}; "
            f"{self._backend}{self._why_not()}; "
            f"weights and cache {self.runner.cache_dtype}; "
            f"{self.pages.total} pages of {self._page} tokens; slices {slices}; "
            f"up to {self._config.max_seqs} x {self._config.max_len} tokens"
        )

    def observe(self, observer: Observer | None) -> None:
        """Calls `observer` around every step and slice of `score`; None removes the observer."""
        self._observer = observer

    def add(self, request: Request) -> int:
        """Queues a request; returns the id that its events will carry.

        Raises:
            EngineError: if the engine is dead.
            RequestError: if it can never be served.
        """
        self._check_alive()
        self.check(request)
        number = self._num_requests
        prefix = self._prefix_of(request.prompt)
        sparse = None
        if self._is_sparse(request.prompt):
            sparse = Sparseness() if prefix is None or prefix.sparse is None else prefix.sparse
        sequence = Sequence(id=number, request=request, prefix=prefix, sparse=sparse)
        with self._unstopped(), self._all_or_nothing():
            self._num_requests += 1
            self._sequences[number] = sequence
            self._scheduler.add(sequence)
        return number

    def check(self, request: Request) -> None:
        """Checks that a request can be served; safe while a step runs in another thread.

        Raises:
            RequestError: if it can never be served.
        """
        check_ids("prompt", request.prompt, self._model.vocab_size)
        if request.eos_ids:
            check_ids("eos_ids", request.eos_ids, self._model.vocab_size)
        prompt, answer = len(request.prompt), request.max_new_tokens
        self._check_length(
            f"{prompt} prompt tokens and up to {answer} new ones, {prompt + answer} in all,",
            prompt + answer,
            self._prefix_of(request.prompt),
        )

    def cancel(self, request_id: int) -> None:
        """Ends a request before the next step; ignored if it has ended already."""
        if request_id in self._sequences:
            self._sequences[request_id].cancelled = True

    def drop(self, request_ids: Container[int]) -> None:
        """Ends requests at once; they get no further events."""
        if self._is_dead:
            return
        with self._unstopped(), self._all_or_nothing():
            for number in [number for number in self._sequences if number in request_ids]:
                self._scheduler.finish(self._sequences.pop(number))
            self._events = [each for each in self._events if each.request_id not in request_ids]

    def step(self) -> list[Event]:
        """Runs one prefill slice or one decode step; returns its events, [] when idle.

        Raises:
            EngineError: if the engine is dead.
            Preempted: before the step, in all processes of a job, if the job is being preempted.
        """
        self._check_alive()
        multihost.check_preemption()
        with self._unstopped():
            self._step()
        events, self._events = self._events, []
        return events

    def restore(
        self,
        tokens: Iterable[int],
        pieces: Iterable[Piece],
        sparse: Sparseness | None = None,
    ) -> None:
        """Inserts the keys and values of a prompt prefix into the cache; possible once.

        Later prompts that begin with these tokens and are longer use them as they are: where the
        attention temperature depends on the length of the prompt, the prefix keeps the scales
        that it was computed with.

        Args:
            tokens: token ids of the prefix.
            pieces: keys and values of all the tokens, as `take` of any engine of this model
                returned them.
            sparse: density and recall of their sparse prefill; None if it was dense.

        Raises:
            RequestError: if a prefix was restored before, or if the tokens are not in the
                model's vocabulary or do not fit.
        """
        tokens = self._checked(tokens)
        if self._prefix is not None:
            raise RequestError("the engine holds restored tokens already: build another engine")
        with self._borrowed(len(tokens)) as pages:
            table = inputs.table(pages, self._table_len)
            for piece in pieces:
                multihost.check_preemption()
                length = piece.stop - piece.start
                shape = self.window(length)
                with self._unstopped():
                    # No name keeps a piece on the device while the next one is loaded.
                    self.runner.insert_kv(piece.load(shape), table, piece.start, length)
            with self._unstopped(), self._all_or_nothing():
                for page in pages:
                    self.pages.share(page)
                self._prefix = Prefix(tokens=tokens, pages=tuple(pages), sparse=sparse)

    def forget(self) -> None:
        """Let go of what `restore` put into the cache, so that other tokens can be restored."""
        self._check_alive()
        if self._prefix is not None:
            with self._unstopped(), self._all_or_nothing():
                self.pages.give(self._prefix.pages)
                self._prefix = None
                self._scheduler.freed()

    def take(self, request_id: int, start: int, stop: int) -> Window:
        """Returns keys and values of the prompt tokens from `start` to `stop`, for `restore`.

        They are padded to the shape of `window(stop - start)`.

        Raises:
            EngineError: if the engine is dead.
            RequestError: if the request is not running, or not prefilled up to `stop`.
        """
        self._check_alive()
        sequence = self._sequences.get(request_id)
        filled = 0 if sequence is None else sequence.prefilled
        if sequence is None or not 0 <= start < stop <= filled:
            raise RequestError(f"request {request_id} holds {filled} tokens, not {start}:{stop}")
        size = self.window(stop - start).shape[1]
        table = inputs.table(sequence.pages, self._table_len)
        return self.runner.extract_kv(table, start, size)

    def window(self, tokens: int) -> jax.ShapeDtypeStruct:
        """Returns the shape [layers, tokens, kv_heads, head_dim], dtype and placement of the
        arrays that `take` returns for `tokens` tokens.
        """
        return self.runner.window(-(-tokens // WINDOW_UNIT) * WINDOW_UNIT)

    def score(
        self, tokens: Iterable[int], *, last: int | None = None
    ) -> Iterator[Float32[np.ndarray, "n V"]]:
        """Yields float32 logits after each of the last `last` tokens (None: all), slice by slice.

        They are the logits that a request with this prompt would see: a prompt over the threshold
        of sparse prefill is scored sparsely, in the same slices and with the same dense tail.
        Holds cache pages while it is being iterated.

        Raises:
            EngineError: if the engine is dead.
            RequestError: if the tokens are not in the model's vocabulary or do not fit.
        """
        tokens = self._checked(tokens)
        if last is not None and not 1 <= last <= len(tokens):
            raise RequestError(f"{last=} must be from 1 to the {len(tokens)} tokens there are")
        return self._score(tokens, 0 if last is None else len(tokens) - last)

    def survey(self, tokens: Iterable[int], grid: Grid) -> Iterator[tuple[int, int, Survey]]:
        """Surveys sparse budgets on a text: yields start, length and survey of each slice.

        Holds cache pages while it is being iterated.

        Raises:
            ConfigError: if the engine runs on a mesh.
            RequestError: if the tokens are not in the model's vocabulary or do not fit.
        """
        self._refuse_mesh("surveys")
        return self._survey(self._checked(tokens), grid)

    def plans(
        self, tokens: Iterable[int], layer: int, head: int
    ) -> Iterator[tuple[int, int, SparsePlan, Report]]:
        """Prefills a text sparsely; yields start, length, plan and report of each slice.

        The plan is that of one layer and query head, before the guard of `least_recall`,
        and goes on to the end of the text, without `dense_tail`.
        Holds cache pages while it is being iterated.

        Raises:
            ConfigError: if the engine runs on a mesh, if there are no budgets, or if no such
                layer and head is prefilled sparsely.
            RequestError: if the tokens are not in the model's vocabulary or do not fit.
        """
        self._refuse_mesh("plans")
        if self._config.sparse is None:
            raise ConfigError("plans need budgets of sparse prefill (sparse_attention_config.json)")
        if self._model.num_layers == 1:
            raise ConfigError("a model of one layer is prefilled densely: its only one is the last")
        for name, value, count in (
            ("layer", layer, self._model.num_layers - 1),
            ("head", head, self._model.num_heads),
        ):
            if not 0 <= value < count:
                raise ConfigError(f"{name}={value} must be from 0 to {count - 1}")
        return self._plans(self._checked(tokens), layer, head)

    def _is_sparse(self, prompt: tuple[int, ...]) -> bool:
        return self._config.sparse is not None and len(prompt) > self._config.sparse.threshold

    def _prefix_of(self, prompt: tuple[int, ...]) -> Prefix | None:
        """Returns the restored prefix if the prompt begins with it, else None."""
        if self._prefix is None or not self._prefix.begins(prompt):
            return None
        return self._prefix

    def _refuse_mesh(self, what: str) -> None:
        if self._mesh is not None:
            raise ConfigError(f"{what} are made on one device: leave out the mesh")

    def _why_not(self) -> str:
        """Returns why no faster kernels run, in parentheses; "" if the best or a chosen one runs.

        Without attention it says that instead.
        """
        if not self._config.attention:
            return " (attention left out)"
        if self._config.backend is not None:
            return ""
        names = backend.PREFERRED[self._device.platform]
        better = names[: names.index(self._backend.prefill)]
        reasons = [f"{name}: {backend.unavailable(name, **self._attended)}" for name in better]
        return f" ({'; '.join(reasons)})" if reasons else ""

    def _devices(self) -> str:
        if self._mesh is None:
            return "1 device"
        axes = ",".join(f"{name}={size}" for name, size in self._mesh.shape.items() if size > 1)
        return f"{self._mesh.size} devices as {axes}"

    def _checked(self, tokens: Iterable[int]) -> tuple[int, ...]:
        self._check_alive()
        tokens = check_ids("tokens", tuple(tokens), self._model.vocab_size)
        self._check_length(f"{len(tokens)} tokens", len(tokens))
        return tokens

    def _survey(self, tokens: tuple[int, ...], grid: Grid) -> Iterator[tuple[int, int, Survey]]:
        for start, length, step in self.cuts(tokens):
            with self._unstopped():
                surveyed = self.runner.survey(step, grid)
            yield start, length, surveyed

    def _plans(self, tokens: tuple[int, ...], layer: int, head: int):
        for start, length, step in self.cuts(tokens):
            with self._unstopped():
                _, report = self.runner.prefill_sparse(step)
                listed = self.runner.sparse_plan(step, layer, head)
            yield start, length, listed, jax.device_get(report)

    def cuts(self, tokens: tuple[int, ...]) -> Iterator[tuple[int, int, PrefillStep]]:
        """Yields start, length and step of each slice of a text."""
        with self._borrowed(len(tokens)) as pages:
            start = 0
            while start < len(tokens):
                length, size = self.layout.slice_bounds(start, len(tokens))
                yield start, length, self._step_of(tokens, start, length, size, pages)
                start += length

    def _score(self, tokens: tuple[int, ...], first: int) -> Iterator[np.ndarray]:
        row_bytes = 4 * self._model.vocab_size
        small = tuple(size for size in self.layout.slices if size * row_bytes <= _SCORE_BYTES)
        small = small or self.layout.slices[-1:]
        sparsely = self._is_sparse(tokens)
        with self._borrowed(len(tokens)) as pages:
            start = 0
            while start < len(tokens):
                multihost.check_preemption()
                length, size, is_sparse = self._scheduler.cut(start, len(tokens), sparsely=sparsely)
                is_scored = start + length > first
                if is_scored and not is_sparse:
                    length, size = self.layout.slice_bounds(start, len(tokens), small)
                    is_scored = start + length > first
                step = self._step_of(tokens, start, length, size, pages)
                kind = "score" if is_scored else "prefill_sparse" if is_sparse else "prefill"
                with (
                    self._unstopped(),
                    self._observed(kind, start=start, tokens=length, size=size) as seen,
                ):
                    compute = self._scored_sparsely if is_sparse else self._scored
                    blocks = compute(step, max(first - start, 0), min(small[0], size), seen)
                yield from blocks
                start += length

    def _scored(
        self, step: PrefillStep, first: int, _: int, seen: Step | None
    ) -> Iterable[np.ndarray]:
        """Computes the logits of a slice from token `first` on, or only prefills it without any."""
        if first < int(step.length):
            return [self.runner.score(step)[first:]]
        logits = self.runner.prefill(step)
        if seen is not None:  # the device may still be at it
            jax.block_until_ready(logits)
        return ()

    def _scored_sparsely(
        self, step: PrefillStep, first: int, rows: int, seen: Step | None
    ) -> Iterable[np.ndarray]:
        """Computes the logits of a sparse slice from token `first` on, lazily, `rows` at a time."""
        length = int(step.length)
        if first < length:
            hidden, report = self.runner.score_sparse(step)
            blocks = (
                self.runner.logits(hidden, row, rows)[: length - row]
                for row in range(first, length, rows)
            )
        else:
            _, report = self.runner.prefill_sparse(step)
            blocks = ()
        if seen is not None:
            seen.density, seen.recall = (float(each.mean()) for each in jax.device_get(report))
        return blocks

    @contextlib.contextmanager
    def _borrowed(self, length: int) -> Iterator[list[int]]:
        """Allocates cache pages for `length` tokens outside any request, freed on exit.

        Raises:
            RequestError: if too few pages are free.
        """
        count = -(-length // self._page)
        if count > self.pages.free:
            raise RequestError(
                f"{length} tokens need {count} cache pages, {self.pages.free} are free: "
                "wait for other requests to end"
            )
        pages: list[int] = []
        try:
            with self._unstopped(), self._all_or_nothing():
                pages += self.pages.take(count)
            yield pages
        finally:
            with self._unstopped(), self._all_or_nothing():
                self.pages.give(pages)
                self._scheduler.freed()

    def _step_of(self, tokens, start: int, length: int, size: int, pages) -> PrefillStep:
        return inputs.prefill(
            tokens[start : start + length],
            size=size,
            start=start,
            pages=pages,
            table_len=self._table_len,
            scales=self._scales(len(tokens)),
        )

    def _check_length(self, what: str, length: int, prefix: Prefix | None = None) -> None:
        pages = self.pages.total
        if self._prefix is not None:
            pages -= len(self._prefix.pages)
        if prefix is not None:
            pages += len(prefix.tokens) // self._page
        room = min(self._config.max_len, pages * self._page)
        if length > room:
            raise RequestError(
                f"{what} do not fit: the engine holds {room} "
                f"(max_len={self._config.max_len}, {self.pages.total} pages of {self._page})"
            )

    @contextlib.contextmanager
    def _observed(
        self, kind: Kind, *sequences: Sequence, start: int = 0, tokens: int, size: int
    ) -> Iterator[Step | None]:
        """Runs a step within the observer's context; yields its `Step`, or None if unobserved."""
        if self._observer is None:
            yield None
            return
        before = self.num_compilations
        step = Step(
            kind=kind,
            requests=tuple(sequence.id for sequence in sequences),
            start=max((sequence.filled for sequence in sequences), default=start),
            tokens=tokens,
            size=size,
            pages=self.pages.used,
        )
        with self._observer(step):
            yield step
            step.compiled = self.num_compilations - before

    def _check_alive(self) -> None:
        if self._is_dead or not self.runner.is_whole:
            raise EngineError(_DEAD)

    @contextlib.contextmanager
    def _unstopped(self) -> Iterator[None]:
        """Defers Ctrl-C to the end of a step; if the step fails midway, the engine may be dead."""
        try:
            with interrupts.deferred():
                yield
        except BaseException:
            self._is_dead |= not self.runner.is_whole
            raise

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Guards changes that must happen together: an exception within it kills the engine."""
        was_dead, self._is_dead = self._is_dead, True
        yield
        self._is_dead = was_dead

    def _step(self) -> None:
        """Runs the next slice or decode step, and appends its events to `_events`."""
        with self._all_or_nothing():
            self._events += [self._end(each, "cancelled") for each in self._scheduler.cancelled()]
            work = self._scheduler.next()
        if isinstance(work, Slice):
            kind = "prefill_sparse" if work.is_sparse else "prefill"
            with self._observed(kind, work.sequence, tokens=work.length, size=work.size) as seen:
                self._prefill(work, seen)
        elif isinstance(work, Decode):
            tokens, size = len(work.sequences), self._config.max_seqs
            with self._observed("decode", *work.sequences, tokens=tokens, size=size):
                self._decode(work)

    def _prefill(self, piece: Slice, seen: Step | None) -> None:
        sequence = piece.sequence
        sampling = sequence.request.sampling if piece.is_last else _GREEDY
        if sampling.repetition_penalty != 1:
            self.runner.set_seen_tokens(sequence.row, sequence.request.prompt)
        if piece.copied is not None:
            self.runner.copy_page(piece.copied, sequence.pages[piece.start // self._page])
        stop = piece.start + piece.length
        step = inputs.prefill(
            sequence.span(piece.start, stop),
            size=piece.size,
            start=piece.start,
            pages=sequence.pages,
            table_len=self._table_len,
            scales=sequence.scales,
        )
        density = recall = np.ones(())
        if piece.is_sparse:
            logits, report = self.runner.prefill_sparse(step)
            density, recall = jax.device_get(report)
            if seen is not None:
                seen.density, seen.recall = float(density.mean()), float(recall.mean())
        else:
            logits = self.runner.prefill(step)
        # After every slice, to wait for it and to see at once when numbers go wrong.
        choice = inputs.sample_step(sampling, row=sequence.row, position=stop)
        found = None
        if piece.is_last and sequence.request.logprobs is not None:
            token, found = self.runner.sample_logprobs(logits, choice)
        else:
            token = self.runner.sample(logits, choice)
        with self._all_or_nothing():
            if sequence.sparse is not None:
                sequence.sparse = sequence.sparse.plus(piece.start, piece.length, density, recall)
            self._events.append(self._prefilled(piece, token, found))

    def _prefilled(self, piece: Slice, token: int, found: Logprobs | None) -> Event:
        """Records that a slice is in the cache, and the token sampled after it."""
        sequence = piece.sequence
        if token < 0:
            return self._fail(sequence)
        self._scheduler.prefilled(piece)
        self.num_prefilled += piece.length
        if not piece.is_last:
            return Event(
                request_id=sequence.id, prefilled=sequence.prefilled, sparse=sequence.sparse
            )
        return self._take(sequence, token, _logprobs(sequence.request, found, row=0))

    def _decode(self, work: Decode) -> None:
        sequences, max_seqs = work.sequences, self._config.max_seqs
        ids = tuple(sequence.id for sequence in sequences)
        if self._slots is None or self._slots[0] != ids:
            slots = inputs.decode_slots(sequences, max_seqs=max_seqs, table_len=self._table_len)
            self._slots = ids, self.runner.place(slots)
        _, slots = self._slots
        step = inputs.decode(
            sequences, max_seqs=max_seqs, page_table=slots.page_table, scales=self._scales
        )
        found = None
        if any(sequence.request.logprobs is not None for sequence in sequences):
            new, found = self.runner.decode_logprobs(slots.sampling, step)
        else:
            new = self.runner.decode(slots.sampling, step)
        with self._all_or_nothing():
            for sequence in sequences:
                token = int(new[sequence.row])
                if token < 0:
                    self._events.append(self._fail(sequence))
                else:
                    self._scheduler.decoded(sequence)
                    logprobs = _logprobs(sequence.request, found, row=sequence.row)
                    self._events.append(self._take(sequence, token, logprobs))

    def _take(self, sequence: Sequence, token: int, logprobs: tuple[TokenLogprobs, ...]) -> Event:
        """Appends a token to an answer, and ends the request if it is the last."""
        if token in sequence.request.eos_ids:
            return self._end(sequence, "stop")
        sequence.answer.append(token)
        if len(sequence.answer) == sequence.request.max_new_tokens:
            return self._end(sequence, "length", tokens=(token,), logprobs=logprobs)
        return Event(
            request_id=sequence.id,
            tokens=(token,),
            logprobs=logprobs,
            prefilled=sequence.prefilled,
            sparse=sequence.sparse,
        )

    def _fail(self, sequence: Sequence) -> Event:
        return self._end(
            sequence,
            "error",
            error=f"the logits after token {sequence.filled} are not finite: "
            "the weights are damaged, or overflow in their dtype",
        )

    def _end(self, sequence: Sequence, finish: Finish, **more) -> Event:
        del self._sequences[sequence.id]
        event = Event(
            request_id=sequence.id,
            prefilled=sequence.prefilled,
            sparse=sequence.sparse,
            finish=finish,
            **more,
        )
        self._scheduler.finish(sequence)
        return event


def kernels(
    model: ModelConfig,
    config: EngineConfig,
    *,
    device: Any,
    dtype: str,
    mesh: Mesh | None,
    say: Callable[[str], None] = lambda _: None,
    name: str = "backend",
) -> tuple[backend.Backends, EngineLayout]:
    """The backends and sizes of an engine; needs no weights.

    Kernels that have never met such a device are compared with the truth first
    (`first_contact.ensure`).

    Args:
        device: of jax; one of those that it runs on.
        dtype: of weights and cache.
        say: is told what is being waited for, if anything is.
        name: what the user calls `EngineConfig.backend`.

    Raises:
        ConfigError: if there are none, or if they differ from the truth.
        Unsupported: if a kernel that was never tried here cannot take the model's shapes.
    """
    platform = device.platform
    try:
        chosen = backend.choose(
            platform,
            config.backend,
            kind=device.device_kind,
            head_dim=model.head_dim,
            dtype=dtype,
        )
    except backend.Unsupported as error:
        raise ConfigError(f"{name}={config.backend!r}: {error}") from None
    seq, tensor = (1, 1) if mesh is None else (mesh.shape["seq"], mesh.shape["tensor"])
    layout = EngineLayout.resolve(model, config, platform=platform, seq=seq)
    if layout.page % seq:
        raise ConfigError(f"page={layout.page} must be a multiple of seq={seq} of the mesh")
    programs = [
        name
        for name in PROGRAMS
        if (config.sparse is not None or name in DENSE)
        and (config.attention or PROGRAMS[name] == "select")
    ]
    shape = Shape(
        num_heads=model.num_heads // tensor,
        num_kv_heads=model.num_kv_heads // tensor,
        head_dim=model.head_dim,
        page=layout.page,
        dtype=dtype,
        geometry=model.dual_chunk,
        parts=seq,
        plan=layout.tiles,
    )
    mine = [device] if mesh is None else mesh.local_devices
    with own_settings():
        first_contact.ensure(
            shape if platform != "cpu" else shape.soon(),
            {name: getattr(chosen, PROGRAMS[name]) for name in programs},
            next((each for each in mine if each.process_index == jax.process_index()), device),
            say,
        )
    return chosen, layout


def _mesh_of(weights) -> Mesh | None:
    """Returns the mesh on which weights lie; None for one device.

    Raises:
        ConfigError: if its axis `data` is larger than 1.
    """
    placed = jax.tree.leaves(weights)[0].sharding
    if not isinstance(placed, NamedSharding) or placed.mesh.size == 1:
        return None
    mesh = placed.mesh
    assert isinstance(mesh, Mesh)
    if mesh.shape["data"] > 1:
        raise ConfigError("an engine runs on a mesh without data: use Replicas")
    return mesh


def _logprobs(request: Request, found: Logprobs | None, *, row: int) -> tuple[TokenLogprobs, ...]:
    """Returns the log-probabilities of `row` in a tuple of one, () if the request wants none."""
    if request.logprobs is None or found is None:
        return ()
    best = slice(request.logprobs)
    top = zip(found.ids[row, best].tolist(), found.top[row, best].tolist(), strict=True)
    return (TokenLogprobs(float(found.sampled[row]), tuple(top)),)


def _scales(model: ModelConfig, vllm_parity: bool, length: int) -> tuple[float, float]:
    """Returns the factors on queries and keys in a sequence of `length` tokens.

    See arXiv:2501.15383, equation 1.
    """
    factor = model.temperature(length)
    return (factor, factor) if vllm_parity else (factor * factor, 1.0)
