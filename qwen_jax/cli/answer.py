"""What ask, chat and generate have in common: prefill with progress, then text as it comes."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from qwen_jax.cli.console import console
from qwen_jax.cli.flags import AnswerFlags, ModelFlags, note, says
from qwen_jax.distributed import multihost
from qwen_jax.engine.request import Request
from qwen_jax.llm.answer import Answer, Engine, Server
from qwen_jax.llm.llm import LLM, Call, Session
from qwen_jax.llm.model import open_model
from qwen_jax.text.tokenizer import Stream

LINE_S = 10.0
"""Seconds between two lines of progress where there is no terminal."""


def front(
    model: Path, model_flags: ModelFlags, answer_flags: AnswerFlags, kv: Path | None, **more: int
) -> LLM | Session:
    """The model, or the session of it that `kv` names; nothing of it is loaded.

    Args:
        more: arguments of `LLM.of`.

    Raises:
        ConfigError: if flags cannot be used, before a session is read.
        SessionError: if the session cannot be used.
    """
    llm = LLM.of(open_model(model, model_flags), **more)
    answer_flags.sampling(llm.opened.generation)
    answer_flags.stops()
    return llm if kv is None else llm.open_session(kv)


def respond(
    front: LLM | Session, call: Call, write: Callable[[str], None], end: Callable[[Answer], None]
) -> None:
    """Answers the only request of a verb and says what that took.

    Args:
        write: called with each piece of the text.
        end: called with the whole answer.

    Raises:
        KeyboardInterrupt: if Ctrl-C ended the answer, after all that.
    """
    request = call.request
    engine = front.engine_for(len(request.prompt) + request.max_new_tokens)
    done = answer(engine, request, stream=call.stream, write=write)
    end(done)
    if done.finish_reason == "cancelled":
        raise KeyboardInterrupt


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
