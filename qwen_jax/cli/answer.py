"""Answer loop of ask, chat and generate: prefill with progress, then streamed text."""

import contextlib
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
from qwen_jax.engine.request import Request
from qwen_jax.llm.answer import Answer, Engine, Server
from qwen_jax.text.tokenizer import Stream

LINE_S = 10.0
"""Seconds between two lines of progress without a terminal."""


@runtime_checkable
class Progress(Protocol):
    """Progress display of a prefill."""

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
    """Runs a request that is alone in the engine; returns its answer.

    Ctrl-C ends the answer, not the program: its finish reason is then "cancelled".

    Args:
        stream: decoder of tokens to text, which looks for stop strings; None for no text.
        write: called with each piece of the text.
        progress: display until the first token; None for a bar or lines on stderr.

    Raises:
        RequestError: if the request does not fit, or the engine fails on it.
    """
    progress = progress or prefill_progress(len(request.prompt))
    server = Server(engine, clock=clock)
    with contextlib.closing(progress), interrupts() as interrupted:
        pending = server.add(request, stream)
        progress.update(0)
        while pending.finish is None:
            if interrupted():
                server.cancel(pending)
            server.step()
            progress.update(pending.prefilled)
            if pending.has_begun:
                progress.close()
            if text := pending.text():
                write(text)
    return pending.answer()


def write(text: str) -> None:
    """Writes a piece of an answer to stdout and flushes it."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def interrupts(*also: signal.Signals) -> Iterator[Callable[[], int]]:
    """Records the first Ctrl-C instead of raising, so that steps complete; a second one raises.

    In a multi-process job, which would have to act on it at the same step, Ctrl-C ends all
    processes.

    Yields a function that returns the number of the recorded signal, 0 for none.

    Args:
        also: other signals to record; none of them interrupts.
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
    """Returns a progress bar on a terminal; elsewhere occasional lines, for readable logs.

    In a multi-process job process 0 shows it.
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
    """Column of tokens per second."""

    def render(self, task: Task) -> Text:
        return Text("compiling" if task.speed is None else f"{task.speed:,.0f} tokens/s")
