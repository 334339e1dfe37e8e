"""AsyncLLM: the Python API for asyncio, with the engine on a thread of its own."""

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, overload

import numpy as np
from jaxtyping import Float32

from qwen_jax.engine.request import EngineError
from qwen_jax.llm.answer import Answer, Pending
from qwen_jax.llm.llm import (
    LLM,
    AnswerArguments,
    Call,
    ChatArguments,
    Front,
    Message,
    Path_,
    Prompt,
    Session,
    answers_of,
    is_prompt,
)

if TYPE_CHECKING:
    from qwen_jax.engine.data_parallel import Replicas
    from qwen_jax.engine.engine import Engine

T = TypeVar("T")
F = TypeVar("F", bound="AsyncFront")


class _Waiting:
    """A coroutine's wait for requests, in its event loop.

    Attributes:
        pendings: requests that are waited for.
        error: exception of a failed step; None if none failed.
    """

    def __init__(self):
        self.pendings: list[Pending] = []
        self.error: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Waits until a step has ended or failed.

        Raises:
            EngineError: or any other exception of the failed step.
        """
        await self._event.wait()
        self._event.clear()
        if self.error is not None:
            raise self.error

    def wake(self) -> None:
        """Ends the wait, from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)


class AsyncStreaming:
    """Asynchronous iterator over the text of one answer; see `Streaming`.

    Attributes:
        answer: the complete answer; None until the iterator is exhausted.
    """

    def __init__(self, front: "AsyncFront", make: Callable[[], Call]):
        self.answer: Answer | None = None
        self._front, self._make = front, make
        self._waiting: _Waiting | None = None
        self._is_over = False

    def __aiter__(self) -> "AsyncStreaming":
        return self

    async def __anext__(self) -> str:
        if self._is_over:
            raise StopAsyncIteration
        try:
            if self._waiting is None:
                call = await asyncio.to_thread(self._make)
                self._waiting = _Waiting()
                await self._front.begin(self._waiting, [call])
            (pending,) = self._waiting.pendings
            while True:
                has_ended = pending.finish is not None
                text = pending.text()
                if text:
                    return text
                if has_ended:
                    break
                await self._waiting.wait()
        except BaseException:
            self._end()
            raise
        self._end()
        self.answer = pending.answer()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancels the request, if its answer has not ended."""
        self._end()

    async def __aenter__(self) -> "AsyncStreaming":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end()

    def __del__(self) -> None:
        if not getattr(self, "_is_over", True):
            self._end()

    def _end(self) -> None:
        self._is_over = True
        if self._waiting is not None:
            self._front.end(self._waiting)
            self._waiting = None


class AsyncFront:
    """Common base of `AsyncLLM` and `AsyncSession`.

    The engine runs on one thread, which steps while there are requests; the event loop is never
    blocked by it. Cancelling a task ends its requests.

    Args:
        open_front: opens the synchronous model or session, on the engine's thread.
    """

    def __init__(self, open_front: Callable[[], Front]):
        self._open = open_front
        self._front: Front | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qwen-jax")
        self._waiting: list[_Waiting] = []
        self._is_stepping = self._is_closed = False

    async def front(self) -> Front:
        """Returns the synchronous `LLM` or `Session`, which the first call loads."""
        return await self._run(self._opened)

    async def engine(self) -> "Engine | Replicas":
        """Returns the engine of token ids, which callers must not step while requests run here."""
        front = await self.front()
        return await self._run(lambda: front.engine)

    @overload
    async def generate(self, prompts: Prompt, **arguments: Unpack[AnswerArguments]) -> Answer: ...

    @overload
    async def generate(
        self, prompts: Sequence[Prompt], **arguments: Unpack[AnswerArguments]
    ) -> list[Answer]: ...

    async def generate(
        self, prompts: Prompt | Sequence[Prompt], **arguments: Unpack[AnswerArguments]
    ) -> Answer | list[Answer]:
        """Generates continuations of prompts, see `LLM.generate`."""
        is_one = is_prompt(prompts)
        several: Any = [prompts] if is_one else list(prompts)
        front = await self.front()
        answers = await self._answers(functools.partial(front.calls, several, arguments))
        return answers[0] if is_one else answers

    @overload
    async def chat(
        self,
        question: str | Sequence[Message],
        *,
        stream: Literal[False] = ...,
        **arguments: Unpack[ChatArguments],
    ) -> Answer: ...

    @overload
    async def chat(
        self,
        question: str | Sequence[Message],
        *,
        stream: Literal[True],
        **arguments: Unpack[ChatArguments],
    ) -> AsyncStreaming: ...

    async def chat(
        self,
        question: str | Sequence[Message],
        *,
        stream: bool = False,
        **arguments: Unpack[ChatArguments],
    ) -> Answer | AsyncStreaming:
        """Answers a question or the last message of a conversation, see `LLM.chat`."""
        front = await self.front()
        if stream:
            return AsyncStreaming(self, lambda: front.asked(question, arguments))
        return (await self._answers(lambda: [front.asked(question, arguments)]))[0]

    async def stream(self, prompt: Prompt, **arguments: Unpack[AnswerArguments]) -> AsyncStreaming:
        """Generates the continuation of one prompt as a stream of text, see `LLM.stream`."""
        front = await self.front()
        return AsyncStreaming(self, lambda: front.calls([prompt], arguments)[0])

    async def count_tokens(self, text: str) -> int:
        """Returns the number of tokens of a text, without a chat template."""
        front = await self.front()
        return await asyncio.to_thread(front.count_tokens, text)

    async def close(self) -> None:
        """Frees weights and cache, after the step in progress."""
        if self._front is not None and not self._is_closed:
            await self._run(self._front.close)
        self._is_closed = True
        self._thread.shutdown(wait=False)

    async def __aenter__(self: F) -> F:
        await self.front()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def begin(self, waiting: _Waiting, calls: Sequence[Call]) -> None:
        """Queues requests; `end` must follow, even after an exception."""

        def add() -> None:
            server = self._opened().server
            for call in calls:
                server.add(call.request, call.stream, to=waiting.pendings)
            self._waiting.append(waiting)
            if not self._is_stepping:
                self._is_stepping = True
                self._thread.submit(self._step)

        await self._run(add)

    def end(self, waiting: _Waiting) -> None:
        """Drops the requests that have not ended, before the next step."""

        def drop() -> None:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            if waiting.pendings and self._front is not None and not self._front.is_closed:
                self._front.server.drop(waiting.pendings)

        try:
            self._thread.submit(drop)
        except RuntimeError:  # it was closed, and holds nothing
            return

    async def _answers(self, make: Callable[[], list[Call]]) -> list[Answer]:
        calls = await asyncio.to_thread(make)
        waiting = _Waiting()
        try:
            await self.begin(waiting, calls)
            while any(each.finish is None for each in waiting.pendings):
                await waiting.wait()
            return answers_of(waiting.pendings)
        finally:
            self.end(waiting)

    async def _run(self, function: Callable[[], T]) -> T:
        if self._is_closed:
            raise EngineError("it was closed, with its weights: open the model again")
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _opened(self) -> Front:
        if self._front is None:
            self._front = self._open()
        return self._front

    def _step(self) -> None:
        """Runs one step, and schedules the next one behind calls that came meanwhile."""
        self._is_stepping = False
        front = self._opened()
        try:
            front.server.step()
        except BaseException as error:  # it reaches all who wait, also where this was closed
            for each in self._waiting:
                each.error = error
        if not all(each.error for each in self._waiting) and front.server.is_busy:
            self._is_stepping = True
            self._thread.submit(self._step)
        for each in self._waiting:
            each.wake()


class AsyncLLM(AsyncFront):
    """`LLM` for asyncio: the same methods, as coroutines.

    The model is loaded by the first call, or by `async with`.

    Args:
        model: see `LLM`.
        arguments: keyword arguments of `LLM`.
    """

    def __init__(self, model: Path_, **arguments: Any):
        super().__init__(functools.partial(LLM, model, **arguments))

    async def llm(self) -> LLM:
        """Returns the synchronous `LLM`."""
        front = await self.front()
        assert isinstance(front, LLM)
        return front

    async def score(self, text: Prompt) -> Float32[np.ndarray, "n"]:
        """Computes the log-probability of every token but the first, see `LLM.score`."""
        llm = await self.llm()
        blocks = llm.score_blocks(await asyncio.to_thread(llm.score_ids, text))
        found = []
        try:
            while (block := await self._run(lambda: next(blocks, None))) is not None:
                found.append(block)
        finally:
            self._thread.submit(blocks.close)
        return np.concatenate(found)

    async def prefill(self, text: Prompt | None = None, **arguments: Any) -> "AsyncSession":
        """Prefills a long prompt once and stores it on disk, see `LLM.prefill`."""
        llm = await self.llm()
        return AsyncSession(await asyncio.to_thread(llm.prefill, text, **arguments))

    async def open_session(self, directory: Path_) -> "AsyncSession":
        """Opens a session that `prefill` wrote, see `LLM.open_session`."""
        llm = await self.llm()
        return AsyncSession(await asyncio.to_thread(llm.open_session, directory))


class AsyncSession(AsyncFront):
    """`Session` for asyncio.

    Args:
        session: session whose engine runs on this object's thread from now on.
    """

    def __init__(self, session: Session):
        super().__init__(lambda: session)
        self._session = session

    @property
    def documents(self) -> list[tuple[str, int]]:
        """Names of the files in its prompt, with their numbers of tokens."""
        return self._session.documents

    @property
    def num_tokens(self) -> int:
        """Length of its prompt in tokens."""
        return self._session.num_tokens
