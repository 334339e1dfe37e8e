"""Answers for ask, chat and generate: prefill with progress, then text as it comes."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.cli.flags import AnswerFlags, ModelFlags
from qwen_jax.cli.progress import Progress
from qwen_jax.distributed import multihost
from qwen_jax.engine.request import Request
from qwen_jax.llm.answer import Answer, Engine, Server
from qwen_jax.llm.llm import LLM, Call, Session
from qwen_jax.llm.model import open_model
from qwen_jax.text.tokenizer import Stream


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


def answer(
    engine: Engine,
    request: Request,
    *,
    stream: Stream | None = None,
    write: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """The answer to a request that is alone in the engine.

    Ctrl-C ends the answer, not the program: it comes back as "cancelled".

    Args:
        stream: makes text of tokens and knows the stop strings; None for no text.
        write: called with each piece of the text.

    Raises:
        RequestError: if the request does not fit, or the engine fails on it.
    """
    progress = Progress(len(request.prompt))
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
