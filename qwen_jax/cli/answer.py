"""The loop behind ask, chat and generate: prefill with progress, then text as it comes."""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from qwen_jax.cli.console import console
from qwen_jax.cli.flags import note, says
from qwen_jax.distributed import multihost
from qwen_jax.engine.request import Finish, Request, RequestError, Serving, Sparseness
from qwen_jax.text.tokenizer import Stream

LINE_S = 10.0
"""Seconds between two lines of progress where there is no terminal."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """What an answer took.

    Attributes:
        prompt_tokens: length of the prompt.
        computed_tokens: those of them that were not in the cache already.
        new_tokens: length of the answer.
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
        """Prompt tokens computed in a second until the first token."""
        return self.computed_tokens / self.ttft_s if self.ttft_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens in a second after the first one."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s else 0.0

    def as_dict(self) -> dict[str, int | float]:
        """All of it, for JSON."""
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
    """An answer that has ended.

    Attributes:
        text: what the tokens say, up to a stop string; None without a tokenizer.
        finish: "stop" at an end token or stop string, "length" at the limit,
            "cancelled" by Ctrl-C.
        sparse: how the prompt was prefilled sparsely; None for densely.
    """

    tokens: tuple[int, ...]
    text: str | None
    finish: Finish
    timings: Timings
    sparse: Sparseness | None = None

    @property
    def summary(self) -> str:
        """What the answer took, and how its prompt was read."""
        if self.sparse is None:
            return f"{self.timings}; dense prefill"
        return (
            f"{self.timings}; sparse prefill: {self.sparse.density:.1%} of the attention computed, "
            f"recall {self.sparse.recall:.3f} ({self.sparse.least_recall:.3f} in the worst head)"
        )


@runtime_checkable
class Engine(Serving, Protocol):
    """What the loop needs of `qwen_jax.engine.engine.Engine`."""

    @property
    def num_prefilled(self) -> int:
        """Prompt tokens computed so far; shared pages do not count."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Shows how much of a prompt has been read."""

    def update(self, done: int) -> None:
        """Called after each step with the tokens done so far."""
        ...

    def close(self) -> None:
        """Called before the first text, and again at the end."""
        ...


def answer(
    engine: Engine,
    request: Request,
    *,
    stream: Stream | None = None,
    write: Callable[[str], None],
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """The answer to a request that is alone in the engine.

    Ctrl-C ends the answer, not the program: it comes back as "cancelled".

    Args:
        stream: makes text of tokens and knows the stop strings; None for no text.
        write: called with each piece of the text.
        progress: shown until the first token; None for a bar or lines on stderr.

    Raises:
        RequestError: if the request does not fit, or the engine fails on it.
    """
    progress = progress or prefill_progress(len(request.prompt))
    tokens: list[int] = []
    parts: list[str] = []
    finish, first_at, last_at, sparse = None, None, 0.0, None
    computed_before = engine.num_prefilled
    with contextlib.closing(progress), interrupts() as interrupted:
        start_at = clock()
        number = engine.add(request)
        progress.update(0)
        while finish is None:
            if interrupted() or (stream is not None and stream.stopped):
                engine.cancel(number)
            for event in engine.step():
                if event.error is not None:
                    raise RequestError(event.error)
                finish, sparse = event.finish, event.sparse
                progress.update(event.prefilled)
                if first_at is None and (event.tokens or finish):
                    first_at = clock()
                    progress.close()
                if event.tokens and not (stream is not None and stream.stopped):
                    last_at = clock()
                    tokens.extend(event.tokens)
                    if stream is not None:
                        parts.append(stream.push(event.tokens))
                        write(parts[-1])
    if stream is not None:
        finish = "stop" if stream.stopped else finish
        parts.append(stream.finish())
        write(parts[-1])
    first_at = clock() if first_at is None else first_at
    return Answer(
        tokens=tuple(tokens),
        text=None if stream is None else "".join(parts),
        finish=finish,
        timings=Timings(
            prompt_tokens=len(request.prompt),
            computed_tokens=engine.num_prefilled - computed_before,
            new_tokens=len(tokens),
            ttft_s=first_at - start_at,
            decode_s=max(last_at - first_at, 0.0),
        ),
        sparse=sparse,
    )


def write(text: str) -> None:
    """Puts a piece of an answer on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def interrupts(*also: signal.Signals) -> Iterator[Callable[[], int]]:
    """Within it Ctrl-C is only remembered, so that no step is torn; a second one interrupts.

    In a job of several processes, which would have to remember it at the same step, it ends all.

    Yields what says which signal came, 0 for none.

    Args:
        also: signals that are remembered too; none of them interrupts.
    """
    if not multihost.is_alone():
        yield lambda: 0
        return
    came = 0

    def on_signal(number: int, _):
        nonlocal came
        if came == number == signal.SIGINT:
            raise KeyboardInterrupt
        came = came or number

    before = {each: signal.signal(each, on_signal) for each in (signal.SIGINT, *also)}
    try:
        yield lambda: came
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def prefill_progress(total: int) -> Progress:
    """A bar on a terminal; elsewhere a line now and then, so that logs stay readable.

    Of several processes process 0 shows it.
    """
    return _Bar(total) if says() and sys.stderr.isatty() else Lines(total)


class Lines:
    """Progress as lines of text, at most one in `LINE_S` seconds."""

    def __init__(
        self,
        total: int,
        *,
        say: Callable[[str], None] = note,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total
        self._say, self._clock = say, clock
        self._start = self._said = clock()

    def update(self, done: int) -> None:
        now = self._clock()
        if done >= self._total or now - self._said < LINE_S:
            return
        self._said = now
        speed = done / (now - self._start)
        left = f"{(self._total - done) / speed:,.0f} s left" if speed else "compiling"
        self._say(f"read {done:,} of {self._total:,} tokens, {speed:,.0f} tokens/s, {left}")

    def close(self) -> None:
        pass


class _Bar:
    """Progress as a bar that vanishes when the answer begins."""

    def __init__(self, total: int):
        self._bar = Bar(
            "reading",
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(),
            TimeRemainingColumn(),
            console=console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=total)
        self._bar.start()

    def update(self, done: int) -> None:
        self._bar.update(self._task, completed=done)

    def close(self) -> None:
        self._bar.stop()


class _Speed(ProgressColumn):
    """Tokens a second."""

    def render(self, task: Task) -> Text:
        return Text("compiling" if task.speed is None else f"{task.speed:,.0f} tokens/s")
