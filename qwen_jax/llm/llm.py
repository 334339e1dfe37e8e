"""LLM and Session: text generation, chat and scoring from Python."""

import contextlib
import dataclasses
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack, overload

import numpy as np
from jaxtyping import Float32

from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.distributed.verbosity import Level
from qwen_jax.engine.request import EngineError, Request, RequestError, check_ids
from qwen_jax.llm import documents, options, sessions
from qwen_jax.llm.answer import Answer, Pending, Server
from qwen_jax.llm.model import Model, open_model
from qwen_jax.llm.options import AnswerOptions, ModelOptions
from qwen_jax.storage import kv_session
from qwen_jax.text.tokenizer import Stream, Tokenizer

if TYPE_CHECKING:
    from qwen_jax.engine.data_parallel import Replicas
    from qwen_jax.engine.engine import Engine

DEFAULT_LEN = 32_768
"""Default of `max_len` in tokens, unless config.json declares less."""

Path_ = str | os.PathLike[str]
Ids = Sequence[int] | np.ndarray
"""Token ids of one prompt."""
Prompt = str | Ids
Message = Mapping[str, str]
"""A turn of a conversation: `{"role": "user", "content": "..."}`."""

F = TypeVar("F", bound="Front")


class AnswerArguments(TypedDict, total=False):
    """Keyword arguments of every method that generates answers.

    Attributes:
        max_new_tokens: maximum length of the answer in tokens; default 512.
        greedy: always take the most likely token.
        temperature: divides the logits; 0 is greedy. As for the next four arguments, None means
            the value of generation_config.json, else a neutral one.
        top_k: sample from this many likeliest tokens; 0 for all.
        top_p: sample from the likeliest tokens of this total probability.
        min_p: sample from tokens of at least this probability relative to the likeliest.
        repetition_penalty: above 1 makes tokens of the prompt and answer less likely.
        seed: seed of the random choices; default 0.
        stop: strings before which an answer ends.
        logprobs: number of likeliest tokens, from 0 to 20, whose log-probabilities are returned
            beside that of each token of the answer; None returns no log-probabilities.
        ignore_eos: do not end the answer at end tokens.
    """

    max_new_tokens: int
    greedy: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int
    stop: str | Sequence[str] | None
    logprobs: int | None
    ignore_eos: bool


class ChatArguments(AnswerArguments, total=False):
    """Keywords of `chat`: those of `AnswerArguments`, and what comes before the question.

    Attributes:
        files: text files and directories.
        exclude: patterns as in .gitignore of what to leave out in directories.
        system: system text instead of the checkpoint's own.
    """

    files: Path_ | Iterable[Path_] | None
    exclude: Sequence[str] | None
    system: str | None


_TEXTS = ("files", "exclude", "system")


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A request for the engine, and the decoder of its answer's text; None for ids only."""

    request: Request
    stream: Stream | None


class Streaming(Iterator[str]):
    """Iterator over the text of one answer as it is generated.

    Closing it cancels the request; so does garbage collection.

    Attributes:
        answer: the complete answer; None until the iterator is exhausted.
    """

    def __init__(self, server: Server, call: Call):
        self.answer: Answer | None = None
        self._server = server
        self._pending: Pending | None = server.add(call.request, call.stream)

    def __next__(self) -> str:
        while self._pending is not None:
            has_ended = self._pending.finish is not None  # before the text: threads may step
            text = self._pending.text()
            if text:
                return text
            if has_ended:
                pending, self._pending = self._pending, None
                self.answer = pending.answer()
                break
            self._server.step(self._pending)
        raise StopIteration

    def close(self) -> None:
        """Cancels the request, if its answer has not ended."""
        if self._pending is not None:
            self._server.drop([self._pending])
            self._pending = None

    def __enter__(self) -> "Streaming":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_pending", None) is not None:
            self._server.forget(self._pending)  # pyright: ignore[reportArgumentType]


class Front:
    """Prompts in, answers out: the base of a model (`LLM`) and of a session of it (`Session`).

    Args:
        opened: the model.
        weights: its weights on their devices; None to load them with the engine.
        max_seqs: requests that run at once.
        kept: a session that every prompt goes on after.
        engines: those of other fronts of the same model, beside which this one has its own.

    Attributes:
        opened: the checkpoint and how it is run.
        kept: the session.
        is_closed: whether it holds nothing any more.
    """

    def __init__(
        self,
        opened: Model,
        weights: Any,
        *,
        max_seqs: int,
        kept: sessions.Kept | None = None,
        engines: weakref.WeakSet | None = None,
    ):
        self.opened, self._weights, self._max_seqs, self.kept = opened, weights, max_seqs, kept
        self._tokenizer = opened.tokenizer(required=False)
        self._engines: weakref.WeakSet = weakref.WeakSet() if engines is None else engines
        self._engine: "Engine | Replicas | None" = None
        self._server: Server | None = None
        self.is_closed = False
        self._lock = threading.RLock()

    @property
    def engine(self) -> "Engine | Replicas":
        """The engine of token ids, built when it is first asked for, see `engine_for`."""
        return self.engine_for(self.max_len)

    def engine_for(self, length: int, *, whole_slices: bool = False) -> "Engine | Replicas":
        """The engine; one that is not built yet gets room for requests of this length.

        Args:
            length: tokens of prompt and answer together.
            whole_slices: see `EngineConfig`.

        Raises:
            CheckpointError: if the weights are missing, damaged or do not fit.
            ConfigError: if the devices cannot hold its cache, beside those of other engines.
            EngineError: if this was closed.
        """
        with self._lock:
            if self.is_closed:
                raise EngineError("it was closed, with its weights: open the model again")
            if self._engine is None:
                kept = self.kept
                engine = self.opened.engine(
                    length,
                    max_seqs=self._max_seqs,
                    vocab_limit=self._tokenizer.size if self._tokenizer else None,
                    weights=self._weights,
                    whole_slices=whole_slices,
                    prefix_tokens=len(kept.tokens) if kept else 0,
                    window=kept.window if kept else 0,
                    beside=self._engines,
                )
                if kept is not None:
                    kept.restore(engine, self.opened.options.say)
                self._engine, self._server = engine, Server(engine)
                self._engines.add(engine)
            return self._engine

    @property
    def server(self) -> Server:
        """Server that shares `engine` between callers and threads."""
        with self._lock:
            _ = self.engine
            assert self._server is not None
            return self._server

    @property
    def max_len(self) -> int:
        """Maximum length of prompt and answer together, in tokens."""
        return self.opened.max_len

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the checkpoint.

        Raises:
            TokenizerError: if the checkpoint has none.
        """
        return self._tokenizer or self.opened.tokenizer()

    def count_tokens(self, text: str) -> int:
        """Returns the number of tokens of a text, without a chat template."""
        return len(self.tokenizer.encode_text(text))

    def close(self) -> None:
        """Frees weights and cache; may be called twice."""
        with self._lock:
            self.is_closed = True
            self._engine = self._server = self._weights = None

    def __enter__(self: F) -> F:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def generate(
        self, prompts: Prompt, *, progress: bool = ..., **arguments: Unpack[AnswerArguments]
    ) -> Answer: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        progress: bool = ...,
        **arguments: Unpack[AnswerArguments],
    ) -> list[Answer]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        progress: bool = False,
        **arguments: Unpack[AnswerArguments],
    ) -> Answer | list[Answer]:
        """Generates continuations of prompts, batched continuously, without a chat template.

        Args:
            prompts: a text or token ids, whose answer is returned; or a sequence of these, whose
                answers are returned in order.
            progress: show a progress bar, in a terminal or a notebook.
            arguments: see `AnswerArguments`.

        Raises:
            ConfigError: if an argument has another type, is out of range or contradicts another.
            RequestError: if a prompt cannot be served, or the engine fails on it.
            TokenizerError: if a text is not Unicode, or there is no tokenizer.
        """
        is_one = is_prompt(prompts)
        calls = self.calls([prompts] if is_one else list(prompts), arguments)  # pyright: ignore
        answers = self._run(calls, progress)
        return answers[0] if is_one else answers

    @overload
    def chat(
        self,
        question: str | Sequence[Message],
        *,
        stream: Literal[False] = ...,
        **arguments: Unpack[ChatArguments],
    ) -> Answer: ...

    @overload
    def chat(
        self,
        question: str | Sequence[Message],
        *,
        stream: Literal[True],
        **arguments: Unpack[ChatArguments],
    ) -> Streaming: ...

    def chat(
        self,
        question: str | Sequence[Message],
        *,
        stream: bool = False,
        **arguments: Unpack[ChatArguments],
    ) -> Answer | Streaming:
        """Answers a question, or the last message of a conversation, in the model's chat format.

        That of a session is about its files.

        Args:
            question: a text, or messages with "role" and "content".
            stream: return the pieces of the text as they come; the answer is `.answer` of them.
            arguments: see `ChatArguments`.

        Raises:
            ConfigError: if arguments contradict each other, or a session holds raw text; see
                `generate` also.
            DocumentError: if a file holds no text or cannot be read.
            RequestError: if it does not fit into `max_len`.
            TokenizerError: if the model has no chat format, or another than ChatML.
        """
        call = self.asked(question, arguments)
        return Streaming(self.server, call) if stream else self._run([call], False)[0]

    def asked(self, question: str | Sequence[Message], arguments: ChatArguments) -> Call:
        """Builds and checks the request of a question, see `chat`."""
        texts: dict[str, Any] = dict(arguments)
        own = {name: texts.pop(name) for name in _TEXTS if name in texts}
        answer = options.answer(texts, *_TEXTS, "question", "stream")
        return self.chat_call(question, answer, **own)

    def chat_call(
        self,
        question: str | Sequence[Message],
        answer: AnswerOptions,
        *,
        files: Path_ | Iterable[Path_] | None = None,
        exclude: Sequence[str] | None = None,
        system: str | None = None,
    ) -> Call:
        """The request of a question with these options, see `chat`."""
        kept, told = self.kept, self.opened.options
        if kept is not None:
            kept.check_chat(told)
        make = self._maker(answer, chat=True)
        if kept is not None or not isinstance(question, str):
            for name, value in (("files", files), ("exclude", exclude), ("system", system)):
                if value is not None:
                    why = "the session holds its text already" if kept else "put it into messages"
                    raise ConfigError(f"{name} goes with a question alone: {why}")
        if not isinstance(question, str):
            if kept is not None:
                raise ConfigError("a session is asked a question, not a list of messages")
            return make(tuple(self.tokenizer.encode_chat(list(question))))
        question = question.strip()  # or its line breaks would join those after the files
        if not question:
            raise ConfigError("the question is empty: give at least one character")

        def read() -> tuple[list[tuple[str, int]], list[int]]:
            texts = self._read(files, exclude)
            text = documents.joined(texts, question) if texts else question
            messages: list[Message] = [{"role": "user", "content": text}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            rows = [(each.name, self.count_tokens(each.text)) for each in texts if told.counts]
            return rows, self.tokenizer.encode_chat(messages)

        if kept is None:
            rows, ids = multihost.broadcast_json(read)
        else:
            rows, ids = kept.documents, [*kept.tokens, *kept.question(self.tokenizer, question)]
        told.counted(rows, len(ids), self.max_len)
        return make(tuple(ids))

    def _read(
        self, files: Path_ | Iterable[Path_] | None, exclude: Sequence[str] | None
    ) -> list[documents.Document]:
        if files is None and not exclude:
            return []
        say, spell = self.opened.options.say, self.opened.options.spelled
        return documents.read(_paths(files), skipped=say, exclude=exclude or (), spell=spell)

    def stream(self, prompt: Prompt, **arguments: Unpack[AnswerArguments]) -> Streaming:
        """Generates the continuation of one prompt as a stream of text, see `generate`."""
        (call,) = self.calls([prompt], arguments)
        return Streaming(self.server, call)

    def calls(
        self, prompts: Sequence[Prompt], arguments: AnswerArguments | AnswerOptions
    ) -> list[Call]:
        """Builds and checks the requests of prompts, see `generate`."""
        make = self._maker(options.answer(arguments, "prompts", "progress"))
        names = [f"prompts[{i}]" for i in range(len(prompts))] if len(prompts) != 1 else ["prompts"]
        return [make(self._ids(*each), each[0]) for each in zip(names, prompts, strict=True)]

    def _ids(self, name: str, prompt: Prompt) -> tuple[int, ...]:
        held = self.kept.tokens if self.kept else ()
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError(f"{name} is empty: give at least one character")
            tokenizer = self.tokenizer
            encode = tokenizer.encode_text if held else tokenizer.encode_prompt
            return (*held, *encode(prompt))
        ids = tuple(prompt) if isinstance(prompt, list) else prompt
        return (*held, *check_ids(name, ids, self.opened.config.vocab_size))

    def _maker(self, answer: AnswerOptions, *, chat: bool = False) -> Callable[..., Call]:
        """Makes a call of prompt ids and the prompt's name, which is empty for the only one."""
        sampling, stops = answer.sampling(self.opened.generation), answer.stops()
        answer.say(answer.described(sampling), Level.DETAIL)
        if stops or chat:
            _ = self.tokenizer  # which they need
        if chat:
            self.tokenizer.check_chatml()
        ends = () if answer.ignore_eos else self.opened.end_ids(self._tokenizer, chat=chat)

        def make(ids: tuple[int, ...], name: str = "") -> Call:
            try:
                self.opened.check_fits(len(ids), answer.max_new_tokens)
            except RequestError as error:
                raise (RequestError(f"{name}: {error}") if "[" in name else error) from None
            request = Request(
                prompt=ids,
                max_new_tokens=answer.max_new_tokens,
                sampling=sampling,
                eos_ids=ends,
                logprobs=answer.logprobs,
            )
            return Call(request, Stream(self._tokenizer, stop=stops) if self._tokenizer else None)

        return make

    def _run(self, calls: Sequence[Call], progress: bool) -> list[Answer]:
        server = self.server
        mine: list[Pending] = []
        try:
            for call in calls:
                server.add(call.request, call.stream, to=mine)
            with _bars(progress, "tokens read", "answers") as show:
                total = sum(len(each.request.prompt) for each in mine)
                for pending in mine:
                    while pending.finish is None:
                        server.step(pending)
                        if progress:
                            read = sum(each.prefilled for each in mine)
                            ended = sum(each.finish is not None for each in mine)
                            show((read, total), (ended, len(mine)))
            return answers_of(mine)
        finally:
            server.drop(mine)


def answers_of(pendings: Sequence[Pending]) -> list[Answer]:
    """Returns the answers of requests that have ended, in order.

    Raises:
        RequestError: naming the prompt, if the engine failed on one.
    """
    if len(pendings) == 1:
        return [pendings[0].answer()]
    answers = []
    for index, pending in enumerate(pendings):
        try:
            answers.append(pending.answer())
        except RequestError as error:
            raise RequestError(f"prompts[{index}]: {error}") from None
    return answers


class LLM(Front):
    """A model with its tokenizer, its weights on their devices, and an engine.

    Prints nothing; errors are raised. Methods may be called from several threads, and
    their requests run together. Ctrl-C in one of them ends its own requests only.

    Args:
        model: a converted checkpoint, a Hugging Face directory, or a hub id that is in
            the local cache, such as "Qwen/Qwen2.5-7B-Instruct-1M".
        max_len: maximum length of prompt and answer together, in tokens; None for 32,768 (or what
            config.json declares, if that is less). The cache has room for `max_seqs` of them.
        max_seqs: maximum number of requests that run at once; others wait.
        dtype: dtype of weights and cache, "f32" or "bf16"; None for the checkpoint's own, on
            a CPU f32.
        mesh: shape of the device mesh, such as "seq=4,tensor=2"; None for all accelerators, or
            one CPU.
        kernels: attention backend; None for the device's preferred one.
        slice: prompt tokens computed at a time; larger is faster and takes more memory.
        sparse: sparse prefill by the checkpoint's budgets: "auto" for prompts over its threshold,
            "on" for all, "off" for none.
        sparse_config: file of budgets instead of the checkpoint's own.
        least_recall: minimum attention recall per head, in (0, 1]; below it the slice is computed
            densely. None for no minimum.
        dense_tail: tokens at a prompt's end that sparse prefill computes densely.
        dca: Dual Chunk Attention: "on", "off", or "auto" as config.json says.
        dca_chunk: largest relative position that the model may see, in tokens.
        dca_local: tokens around chunk borders that are seen at their true distance.
        dca_original: training length of the attention temperature in tokens; 0 for none.
        vllm_parity: scale cached keys with the attention temperature, as vLLM does.
        compile_cache: store compiled programs on disk, and reuse stored ones.

    Raises:
        FileNotFoundError, NotADirectoryError: if there is no such model.
        ConfigError: if an argument or a file cannot be used.
        CheckpointError: if weights are missing, damaged or do not fit.
    """

    def __init__(
        self,
        model: Path_,
        *,
        max_len: int | None = None,
        max_seqs: int = 8,
        dtype: Literal["f32", "bf16"] | None = None,
        mesh: str | None = None,
        kernels: str | None = None,
        slice: int | None = None,  # noqa: A002
        sparse: Literal["auto", "on", "off"] = "auto",
        sparse_config: Path_ | None = None,
        least_recall: float | None = None,
        dense_tail: int = 64,
        dca: Literal["auto", "on", "off"] = "auto",
        dca_chunk: int | None = None,
        dca_local: int | None = None,
        dca_original: int | None = None,
        vllm_parity: bool = False,
        compile_cache: bool = True,
    ):
        options.check_number("max_seqs", max_seqs, [options.Within(1)])
        opened = open_model(
            _path(model),
            ModelOptions(
                max_len=max_len,
                dtype=dtype,
                mesh=mesh,
                kernels=kernels,
                slice=slice,
                sparse=sparse,
                sparse_config=None if sparse_config is None else _path(sparse_config),
                least_recall=least_recall,
                dense_tail=dense_tail,
                dca=dca,
                dca_chunk=dca_chunk,
                dca_local=dca_local,
                dca_original=dca_original,
                vllm_parity=vllm_parity,
                no_compile_cache=not compile_cache,
            ),
        )
        if max_len is None:
            length = min(opened.max_len, DEFAULT_LEN)
            chosen = dataclasses.replace(opened.options, max_len=length)
            opened = dataclasses.replace(opened, max_len=length, options=chosen)
        super().__init__(opened, opened.weights(), max_seqs=max_seqs)

    @classmethod
    def of(cls, opened: Model, *, max_seqs: int = 1) -> "LLM":
        """A model that was opened already; its weights are loaded with its engine."""
        made = cls.__new__(cls)
        Front.__init__(made, opened, None, max_seqs=max_seqs)
        return made

    def score(self, text: Prompt) -> Float32[np.ndarray, "n"]:
        """Computes the log-probability of every token but the first, given those before it.

        A text over the threshold of sparse prefill is computed sparsely, as a prompt would be.

        Returns:
            float32 array with one element less than the text has tokens.

        Raises:
            RequestError: if it has fewer than two tokens, does not fit, or the cache is in use.
        """
        ids = self.score_ids(text)
        return np.concatenate(list(self.score_blocks(ids)))

    def score_ids(self, text: Prompt) -> tuple[int, ...]:
        """Returns the token ids of a text for `score`; checks that it fits.

        Raises:
            RequestError: if it has fewer than two tokens or does not fit.
        """
        ids = self._ids("text", text)
        self.opened.check_fits(len(ids))
        if len(ids) < 2:
            raise RequestError("text has one token: give at least two")
        return ids

    def score_blocks(self, ids: tuple[int, ...]) -> Generator[Float32[np.ndarray, "n"]]:
        """Yields the log-probabilities of `score`, slice by slice."""
        start = 0
        for block in self.engine.score(ids):
            following = np.asarray(ids[start + 1 : start + 1 + len(block)], np.int64)
            start += len(block)
            rows = block[: len(following)]
            top = rows.max(-1, keepdims=True)
            total = np.log(np.exp(rows - top).sum(-1, dtype=np.float64)) + top[:, 0]
            chosen = rows[np.arange(len(following)), following]
            yield (chosen - total).astype(np.float32)

    def prefill(
        self,
        text: Prompt | None = None,
        *,
        out: Path_,
        files: Path_ | Iterable[Path_] | None = None,
        exclude: Sequence[str] | None = None,
        system: str | None = None,
        save_every: int = 65_536,
        overwrite: bool = False,
        progress: bool | Callable[[int, int], object] = False,
    ) -> "Session":
        """Reads a long prompt once and keeps its keys and values on disk.

        What was stopped goes on with the same arguments where it saved last.

        Args:
            text: raw text or token ids, which `Session.generate` goes on after.
            out: directory of the session.
            files: text files and directories instead, for `Session.chat`.
            exclude: patterns as in .gitignore of what to leave out in directories.
            system: system text before the files instead of the checkpoint's own.
            save_every: tokens between two savings, in memory twice while they are saved.
            overwrite: replace another session that is there.
            progress: show a bar, in a terminal or a notebook; or what is told, before and after
                each step, the tokens read and those of the prompt. What it raises may be
                KeyboardInterrupt or Preempted: all that was read is saved first.

        Raises:
            ConfigError: if arguments contradict each other.
            DocumentError: if a file holds no text or cannot be read.
            RequestError: if it does not fit into `max_len`.
            SessionError: if `out` holds something else, or cannot be written.
        """
        if (text is None) == (files is None):
            raise ConfigError("give one of text and files")
        if text is not None and (exclude or system is not None):
            raise ConfigError(f"{'exclude' if exclude else 'system'} goes with files: leave it out")
        options.check_number("save_every", save_every, [options.Within(1)])
        began, say = time.monotonic(), self.opened.options.say
        sessions.check_mesh(self.opened)
        rows: list[tuple[str, int]] = []
        if text is not None:
            ids = self._ids("text", text)
        else:
            self.tokenizer.check_chatml()
            found = multihost.broadcast_json(
                lambda: sessions.files_prompt(self.tokenizer, self._read(files, exclude), system)
            )
            rows, ids = [(name, count) for name, count in found[0]], tuple(found[1])
            self.opened.options.counted(rows, len(ids), self.max_len)
        self.opened.check_fits(len(ids))
        out = _path(out)
        with kv_session.Writer(
            out,
            sessions.identity(self.opened, ids, is_chat=files is not None),
            ids,
            documents=tuple(rows),
            versions=sessions.versions(),
            overwrite=overwrite,
        ) as writer:
            before = writer.session.saved
            if before == len(ids):
                say(f"{out} is complete already: {_described(writer.session)}")
            else:
                if before:
                    say(f"{out} holds {before:,} of {len(ids):,} tokens: going on there")
                with _bars(progress is True, "tokens read") as bar:
                    sessions.fill(
                        self.opened,
                        ids,
                        writer,
                        save_every,
                        progress if callable(progress) else lambda *done: bar(done),
                        weights=self._weights,
                        beside=self._engines,
                    )
                say(
                    f"{len(ids) - before:,} tokens in {time.monotonic() - began:,.1f} s; "
                    f"{out} is complete: {_described(writer.session)}"
                )
        stamp = kv_session.stamp(out, writer.session)
        return self._session(
            sessions.Kept(directory=out, session=writer.session, tokens=ids, stamp=stamp)
        )

    def open_session(self, directory: Path_) -> "Session":
        """Opens a session that `prefill` or the command line wrote.

        Raises:
            RequestError: if its prompt does not fit into `max_len`.
            SessionError: if it is damaged, incomplete, or another model's.
        """
        kept = sessions.open_kept(self.opened, _path(directory))
        self.opened.check_fits(len(kept.tokens) + 1)
        return self._session(kept)

    def _session(self, kept: sessions.Kept) -> "Session":
        return Session(
            self.opened, self._weights, max_seqs=self._max_seqs, kept=kept, engines=self._engines
        )


class Session(Front):
    """A prefilled prompt from disk, with an engine of its own whose requests continue it."""

    kept: sessions.Kept

    @property
    def documents(self) -> list[tuple[str, int]]:
        """Names of the files in its prompt, with their numbers of tokens."""
        return self.kept.documents

    @property
    def num_tokens(self) -> int:
        """Length of its prompt in tokens."""
        return len(self.kept.tokens)


def is_prompt(prompts: object) -> bool:
    """Returns True for one prompt, a text or token ids, and False for a sequence of prompts.

    Raises:
        ConfigError: if it is neither.
    """
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, np.ndarray) and prompts.ndim > 0:
        return prompts.ndim == 1
    if not isinstance(prompts, Sequence):
        raise ConfigError(f"prompts must be texts or token ids, got {type(prompts).__name__}")
    return bool(prompts) and isinstance(prompts[0], int | np.integer)


def _path(path: Path_) -> Path:
    return Path(os.path.expanduser(os.fspath(path)))


def _paths(files: Path_ | Iterable[Path_] | None) -> list[Path]:
    if files is None:
        return []
    return (
        [_path(files)] if isinstance(files, str | os.PathLike) else [_path(each) for each in files]
    )


def _described(session: kv_session.Session) -> str:
    return f"{session.saved:,} tokens, {session.num_bytes / 1e9:.3f} GB"


@contextlib.contextmanager
def _bars(wanted: bool, *names: str) -> Iterator[Callable[..., None]]:
    """Bars in a terminal or a notebook, and what is told of each how much of how much is done."""
    if not wanted:
        yield lambda *_: None
        return
    from rich.progress import Progress

    with Progress() as progress:
        tasks = [progress.add_task(name, total=None) for name in names]

        def show(*done: tuple[int, int]) -> None:
            for task, (completed, total) in zip(tasks, done, strict=True):
                progress.update(task, completed=completed, total=total)

        yield show
