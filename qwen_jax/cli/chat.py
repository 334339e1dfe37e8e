"""chat: talk to a model at the terminal."""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.cli import placement
from qwen_jax.cli.answer import answer, front, write
from qwen_jax.cli.flags import (
    AnswerFlags,
    Kv,
    ModelArgument,
    ModelFlags,
    System,
    expand,
    note,
    refuse_text,
)
from qwen_jax.cli.profile import profiled
from qwen_jax.config import ConfigError
from qwen_jax.engine.request import Request, RequestError, Sampling
from qwen_jax.llm import documents
from qwen_jax.llm.documents import Document, DocumentError
from qwen_jax.llm.llm import DEFAULT_LEN, LLM, Session
from qwen_jax.text.tokenizer import Stream, TokenizerError

_HISTORY_BYTES = LINE_CHARS = 1 << 26

_HELP = """\
/file PATH            put a text file or directory before your next message
/tokens               show how long the conversation is
/params [NAME VALUE]  show the sampling settings, or change one
/reset                begin a new conversation
/help                 show this
/quit                 leave; so does Ctrl-D
Ctrl-C stops an answer. History is kept; the up arrow goes back in it."""


@expand
@profiled
def chat(
    model: ModelArgument,
    model_flags: ModelFlags,
    answer_flags: AnswerFlags,
    system: System = None,
    kv: Kv = None,
):
    """Talk to a model.

    The conversation stays in the cache, so that each turn reads only what is new.
    It holds 32,768 tokens, or what config.json declares if that is less, unless
    --max-len says otherwise. With --kv it goes on after the files of a session, which
    it has room for beside them. Without a terminal, each line of stdin is a message.
    Type /help for commands.

    Examples:
        qwen-jax chat ckpt/7b-1m
        qwen-jax chat ckpt/7b-1m --max-len 262144 --system "Answer in French."
        echo "What is the capital of France?" | qwen-jax chat ckpt/7b-1m
    """
    placement.one_process("a conversation runs")
    if kv is not None:
        refuse_text({"--system": system})
    llm = front(model, model_flags, answer_flags, kv)
    llm.tokenizer.check_chatml()
    if isinstance(llm, Session):
        llm.kept.check_chat(model_flags)
    Conversation(llm, answer_flags, system).talk(_typed() if sys.stdin.isatty() else _piped())


class Conversation:
    """Turns of a conversation as token ids, and the commands that act on them.

    The ids of the model's answers are kept unchanged, so that every
    prompt begins with the one before it and the engine finds it in its cache.
    """

    def __init__(self, llm: LLM | Session, flags: AnswerFlags, system: str | None):
        self._tokenizer, self._kept, self._opened = llm.tokenizer, llm.kept, llm.opened
        self._sampling, self._stops = flags.sampling(llm.opened.generation), flags.stops()
        self._max_new_tokens = flags.max_new_tokens
        self._eos_ids = llm.opened.end_ids(llm.tokenizer, chat=True)
        held = len(self._kept.tokens) if self._kept else 0
        llm.opened.check_fits(held + 1)
        self._room = llm.opened.options.max_len or min(llm.max_len, held + DEFAULT_LEN)
        self._engine = llm.engine_for(self._room)
        opening = self._kept.tokens if self._kept else self._tokenizer.open_chat(system)
        self._opening = self._ids = list(opening)
        self._files: list[Document] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/file": self._attach,
            "/tokens": lambda _: note(f"{len(self._ids):,} tokens of {self._room:,}"),
            "/params": self._params,
            "/reset": self._reset,
            "/help": lambda _: note(_HELP),
        }

    def talk(self, lines: Iterator[str]) -> None:
        """Answers messages and runs commands until /quit or the end of `lines`."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            try:
                if text.startswith("/"):
                    self._obey(text)
                elif text:
                    self._reply(text)
            except (ConfigError, DocumentError, RequestError, TokenizerError) as error:
                note(f"error: {error}")
            except OSError as error:
                note(f"error: {error.filename}: {error.strerror}")

    def _obey(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name not in self._commands:
            raise ConfigError(f"there is no {name}; /help lists the commands")
        self._commands[name](argument.strip())

    def _reply(self, text: str) -> None:
        message = documents.joined(self._files, text) if self._files else text
        if self._kept is not None and self._ids is self._opening:
            turn = self._kept.question(self._tokenizer, message)
        else:
            turn = self._tokenizer.encode_turn("user", message) + self._tokenizer.open_answer()
        prompt = (*self._ids, *turn)
        left = self._room - len(prompt)
        if left < 1:
            raise RequestError(
                f"the conversation would have {len(prompt):,} tokens, it holds {self._room:,}: "
                "/reset begins a new one, --max-len holds more"
            )
        request = Request(
            prompt=prompt,
            max_new_tokens=min(self._max_new_tokens, left),
            sampling=self._sampling,
            eos_ids=self._eos_ids,
        )
        stream = Stream(self._tokenizer, stop=self._stops)
        done = answer(self._engine, request, stream=stream, write=write)
        print()
        note(done.summary)
        if done.finish_reason == "cancelled" and not done.token_ids:
            note("stopped before the first word: your message is not in the conversation")
            return
        if done.finish_reason == "length":
            note(f"the answer was cut off after {request.max_new_tokens:,} tokens")
        self._ids = [*prompt, *done.token_ids, *self._tokenizer.close_turn()]
        self._files = []

    def _attach(self, argument: str) -> None:
        path = Path(os.path.expanduser(argument))
        if not argument or path == documents.STDIN:
            why = ": standard input is the conversation itself" if argument else ""
            raise ConfigError(f"/file needs a path{why}")
        found = documents.read([path], skipped=note)
        self._files += found
        rows = [(each.name, len(self._tokenizer.encode_text(each.text))) for each in found]
        total = len(self._ids) + sum(count for _, count in rows)
        self._opened.options.counted(rows, total, self._room)

    def _params(self, argument: str) -> None:
        kinds = {field.name: field.type for field in dataclasses.fields(Sampling)}
        kinds["max_new_tokens"] = int
        name, _, value = argument.partition(" ")
        if name and name not in kinds:
            raise ConfigError(f"there is no parameter {name!r}; there are {', '.join(kinds)}")
        try:
            number = (int if kinds[name] is int else float)(value) if name else 0
        except ValueError:
            raise ConfigError(f"{name} must be a number, got {value!r}") from None
        if name == "max_new_tokens":
            request = Request(prompt=(0,), max_new_tokens=int(number))
            self._max_new_tokens = request.max_new_tokens
        elif name:
            self._sampling = dataclasses.replace(self._sampling, **{name: number})
        settings = dataclasses.asdict(self._sampling) | {"max_new_tokens": self._max_new_tokens}
        note(", ".join(f"{name} {value}" for name, value in settings.items()))

    def _reset(self, _: str) -> None:
        self._ids, self._files = self._opening, []
        note("a new conversation")


def _piped() -> Iterator[str]:
    """Yields lines of standard input.

    Raises:
        ConfigError: if a line is too long.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is not UTF-8 is refused as a message
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    while line := sys.stdin.readline(LINE_CHARS):
        if len(line) == LINE_CHARS:
            raise ConfigError(f"a line of standard input has over {LINE_CHARS:,} characters")
        yield line


def _typed() -> Iterator[str]:
    """Yields lines that the user types; Ctrl-C clears one, Ctrl-D ends the input."""
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(history=_history())
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            try:
                yield session.prompt("> ")
            except EOFError:
                return


def _history():
    """Returns the input history, in a file if possible, else in memory."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        def store_string(self, string):
            with contextlib.suppress(OSError):  # a disk that filled up
                super().store_string(string)

    try:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        path = Path(base) / "qwen-jax" / "history"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        usable = path.is_file() and path.stat().st_size <= _HISTORY_BYTES
        usable &= os.access(path, os.R_OK | os.W_OK)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: there is no home
        usable = False
    return History(str(path)) if usable else InMemoryHistory()
