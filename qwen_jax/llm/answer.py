"""Requests in an engine, their streamed text, answers and timings."""

import dataclasses
import threading
import time
from collections.abc import Callable, Container, Iterable
from typing import Protocol, runtime_checkable

from qwen_jax.engine import interrupts
from qwen_jax.engine.request import (
    Event,
    Finish,
    Request,
    RequestError,
    Serving,
    Sparseness,
    TokenLogprobs,
)
from qwen_jax.text.tokenizer import Stream


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Token counts and times of an answer.

    Attributes:
        prompt_tokens: length of the prompt.
        computed_tokens: prompt tokens that were not in the cache already.
        new_tokens: length of the answer in tokens.
        ttft_s: seconds from the request to its first token, compilation included.
        decode_s: seconds from the first token to the last.
    """

    prompt_tokens: int
    computed_tokens: int
    new_tokens: int
    ttft_s: float
    decode_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed per second until the first token."""
        return self.computed_tokens / self.ttft_s if self.ttft_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens generated per second after the first one."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s else 0.0

    def as_dict(self) -> dict[str, int | float]:
        """Returns all counts, times and rates, for JSON."""
        return dataclasses.asdict(self) | {
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }

    def __str__(self) -> str:
        shared = self.prompt_tokens - self.computed_tokens
        return (
            f"{self.prompt_tokens:,} prompt tokens"
            f"{f' ({shared:,} from the cache)' if shared else ''}, "
            f"first token after {self.ttft_s:.2f} s, "
            f"prefill {self.prefill_tokens_per_s:,.1f} tokens/s; "
            f"{self.new_tokens:,} new tokens, decode {self.decode_tokens_per_s:,.1f} tokens/s"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A complete answer.

    Attributes:
        token_ids: generated token ids, without the end token.
        text: decoded text, up to a stop string; None without a tokenizer.
        finish_reason: "stop" at an end token or stop string, "length" at the limit,
            "cancelled" by the caller.
        timings: token counts and times.
        logprobs: log-probabilities at each of `token_ids`; None if the request asked for none.
        sparse: density and recall of the prompt's sparse prefill; None if it was dense.
    """

    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: Finish
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] | None = None
    sparse: Sparseness | None = None

    @property
    def summary(self) -> str:
        """One line on timings, and on density and recall of the prefill."""
        if self.sparse is None:
            return f"{self.timings}; dense prefill"
        return (
            f"{self.timings}; sparse prefill: {self.sparse.density:.1%} of the attention computed, "
            f"recall {self.sparse.recall:.3f} ({self.sparse.least_recall:.3f} in the worst head)"
        )


@runtime_checkable
class Engine(Serving, Protocol):
    """Interface of `qwen_jax.engine.engine.Engine` that answers need."""

    @property
    def num_prefilled(self) -> int:
        """Prompt tokens computed so far; shared pages do not count."""
        ...

    def drop(self, request_ids: Container[int]) -> None:
        """Ends requests at once; they get no further events."""
        ...


class Pending:
    """A request in an engine, and its answer so far.

    Attributes:
        prefilled: prompt tokens that are in the cache.
        has_begun: whether the answer has a token, or has ended without one.
        finish: reason why it has ended; None while it goes on.
    """

    def __init__(
        self, number: int, request: Request, stream: Stream | None, clock: Callable[[], float]
    ):
        self.number, self.request = number, request
        self.prefilled = 0
        self.has_begun = False
        self.finish: Finish | None = None
        self._stream, self._clock = stream, clock
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._parts: list[str] = []
        self._num_read = 0  # parts that `text` gave
        self._computed = 0
        self._sparse: Sparseness | None = None
        self._error: str | None = None
        self._start_at = clock()
        self._first_at, self._last_at = self._start_at, 0.0

    @property
    def is_stopped(self) -> bool:
        """True after a stop string; later tokens are ignored."""
        return self._stream is not None and self._stream.stopped

    def take(self, event: Event, computed: int | None) -> None:
        """Adds the event of a step.

        Args:
            computed: prompt tokens that the step computed; None for the increase of the event's
                `prefilled`.
        """
        self._computed += event.prefilled - self.prefilled if computed is None else computed
        self.prefilled, self._sparse = event.prefilled, event.sparse
        if not self.has_begun and (event.tokens or event.finish):
            self._first_at, self.has_begun = self._clock(), True
        if event.tokens and not self.is_stopped:
            self._last_at = self._clock()
            self._tokens.extend(event.tokens)
            self._logprobs.extend(event.logprobs)
            if self._stream is not None:
                self._parts.append(self._stream.push(event.tokens))
        if event.finish is not None:
            self._error = event.error
            if self._stream is not None:
                self._parts.append(self._stream.finish())
            self.finish = "stop" if self.is_stopped else event.finish

    def text(self) -> str:
        """Returns the text that is new since the last call."""
        new = self._parts[self._num_read :]
        self._num_read += len(new)
        return "".join(new)

    def answer(self) -> Answer:
        """Returns the complete answer; `finish` must be set.

        Raises:
            RequestError: if the engine failed on it.
        """
        assert self.finish is not None
        if self._error is not None:
            raise RequestError(self._error)
        return Answer(
            token_ids=tuple(self._tokens),
            text=None if self._stream is None else "".join(self._parts),
            finish_reason=self.finish,
            timings=Timings(
                prompt_tokens=len(self.request.prompt),
                computed_tokens=self._computed,
                new_tokens=len(self._tokens),
                ttft_s=self._first_at - self._start_at,
                decode_s=max(self._last_at - self._first_at, 0.0),
            ),
            logprobs=None if self.request.logprobs is None else tuple(self._logprobs),
            sparse=self._sparse,
        )


class Server:
    """Shares one engine between callers, each of which steps it while waiting for its requests.

    One step runs at a time, in any thread. Ctrl-C waits for the end of a step, whose
    events reach all requests.

    Args:
        engine: engine that serves the requests.
        clock: returns the time in seconds, for timings.
    """

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.monotonic):
        self._engine, self._clock = engine, clock
        self._pending: dict[int, Pending] = {}
        self._lock = threading.RLock()

    @property
    def is_busy(self) -> bool:
        """True while a request has not ended."""
        return bool(self._pending)

    def add(
        self, request: Request, stream: Stream | None = None, *, to: list[Pending] | None = None
    ) -> Pending:
        """Queues a request.

        Args:
            stream: decoder of tokens to text, which looks for stop strings; None for no text.
            to: list to which the request is appended, even if Ctrl-C interrupts the caller.

        Raises:
            RequestError: if it can never be served.
        """
        with self._lock, interrupts.deferred():
            number = self._engine.add(request)
            pending = self._pending[number] = Pending(number, request, stream, self._clock)
            if to is not None:
                to.append(pending)
        return pending

    def step(self, until: Pending | None = None) -> None:
        """Runs one step, unless the request `until` has ended already.

        Raises:
            EngineError: if the engine is dead.
        """
        with self._lock, interrupts.deferred():
            if until is not None and until.finish is not None:
                return
            for each in self._pending.values():
                if each.is_stopped:
                    self._engine.cancel(each.number)
            before = self._engine.num_prefilled
            events = self._engine.step()
            computed = self._engine.num_prefilled - before
            pairs = [(self._pending.get(event.request_id), event) for event in events]
            read = [each for each, event in pairs if each and event.prefilled > each.prefilled]
            for pending, event in pairs:
                if pending is not None:
                    alone = len(read) == 1 and pending is read[0]
                    pending.take(event, computed if alone else None)
                    if pending.finish is not None:
                        del self._pending[pending.number]

    def cancel(self, pending: Pending) -> None:
        """Ends a request before the next step, with a last event."""
        if pending.finish is None:
            self._engine.cancel(pending.number)

    def forget(self, pending: Pending) -> None:
        """Ends a request before the next step; it gets no further events."""
        if self._pending.pop(pending.number, None) is not None:
            self._engine.cancel(pending.number)

    def drop(self, pendings: Iterable[Pending]) -> None:
        """Ends requests at once, if they have not ended; they get no further events."""
        with self._lock, interrupts.deferred():
            numbers = [each.number for each in pendings if each.number in self._pending]
            for number in numbers:
                del self._pending[number]
            if numbers:
                self._engine.drop(numbers)
