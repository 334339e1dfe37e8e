"""Tokenizer: text to ids without control tokens, ChatML turns, streaming decoding."""

import codecs
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers

from qwen_jax.files.reading import printable, shown
from qwen_jax.text import pieces, tokenizer_file
from qwen_jax.text.chat_template import Chat, examine
from qwen_jax.text.template_probe import EMPTY, GIVEN, NONE, ROLES, chatml, kind
from qwen_jax.text.tokenizer_file import TokenizerError

STOP_CHARS = 4096
"""Maximum length of a stop string in characters."""

_WAYS_OUT = {
    GIVEN: "use `generate`",
    EMPTY: "give a system text that is not empty",
    NONE: "give a system text of your own (--system, or a system message)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A byte-level BPE tokenizer whose text never becomes a control token.

    Attributes:
        directory: directory of the files; named in errors.
        model: library tokenizer that encodes text. It recognises added tokens that are ordinary
            words (part numbers, say), but not control tokens.
        added: ids of the added tokens (`<|im_end|>`, `<tool_call>`, ...) by content.
        contents: content, by id, of added tokens that are not in the vocabulary.
        control_ids: ids of added tokens that text is never encoded to: special tokens, tokens
            that the chat template names, and Qwen's own.
        special: ids of added tokens that decoding leaves out.
        size: one more than the largest id in use; ids from here on
            are padding of the embedding.
        names: special tokens by their names in templates, as far as the files define them.
        template: the checkpoint's chat template, or None.
        before: ids that the post-processor puts before a raw prompt (a BOS token, say).
        after: ids that it puts after a raw prompt.
        cuttable: whether texts may be encoded in pieces, see `pieces.cut`.
        turns_fault: reason why the library encodes ChatML turns to other ids; None if it does not.
    """

    directory: Path
    model: tokenizers.Tokenizer
    added: Mapping[str, int]
    contents: Mapping[int, str]
    control_ids: frozenset[int]
    special: frozenset[int]
    size: int
    names: Mapping[str, str | None]
    template: str | None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    cuttable: bool = False
    turns_fault: str | None = None

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer":
        """Loads the tokenizer of a Hugging Face directory or of a converted checkpoint.

        Raises:
            TokenizerError: if `tokenizer.json` is missing or malformed, is not byte-level, or has
                steps that may lengthen a text without bound.
        """
        directory = Path(directory)
        files = tokenizer_file.read(directory)
        tokenizer = cls(
            directory=directory,
            model=files.model,
            added=files.added,
            contents=files.contents,
            control_ids=frozenset(files.added[content] for content in files.control),
            special=frozenset(files.added[content] for content in files.special),
            size=files.size,
            names=files.names,
            template=files.template,
            before=files.before,
            after=files.after,
            cuttable=files.cuttable,
        )
        # Before anybody encodes with it: the library's own ids need a switch that all share.
        return dataclasses.replace(tokenizer, turns_fault=tokenizer._compare_turns())

    @property
    def eos(self) -> int | None:
        """Id of the token that ends an answer, or None if the files name none."""
        return self.added.get(self.names.get("eos_token") or "")

    def encode_text(self, text: str) -> list[int]:
        """Encodes text, never to a control id: `<|im_end|>` in it is ten ordinary characters.

        Other threads go on meanwhile, and a long text is encoded by all cores.

        Raises:
            TokenizerError: if the text holds a lone surrogate, which no UTF-8 text can.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"character {error.start} of the text is the lone surrogate "
                f"{text[error.start]!a}: it is not valid Unicode, remove it"
            ) from None
        path = shown(self.directory / "tokenizer.json")
        # `encode` holds Python's lock for as long as it takes, `encode_batch_fast` does not.
        encoded = tokenizer_file.guarded(
            path,
            self.model.encode_batch_fast,
            pieces.cut(text) if self.cuttable else [text],
            add_special_tokens=False,
        )
        ids = list(itertools.chain.from_iterable(each.ids for each in encoded))
        forged = self.control_ids.intersection(ids)
        if forged:
            raise TokenizerError(
                f"{path} makes control token {min(forged)} out of "
                "plain text: its vocabulary can be spelled, do not use it"
            )
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Encodes a raw prompt: `text` with the ids that the post-processor puts around it.

        The result is that of `tokenizer(text)` in transformers; chats do not use these ids.

        Raises:
            TokenizerError: see `encode_text`.
        """
        return [*self.before, *self.encode_text(text), *self.after]

    def encode_turn(self, role: str, content: str) -> list[int]:
        """Encodes one ChatML turn; its control tokens are placed here, never parsed from text.

        Raises:
            TokenizerError: if the role is unknown, or the checkpoint does not speak ChatML.
        """
        return [*self.open_turn(role, content), *self.close_turn()]

    def open_turn(self, role: str, content: str) -> list[int]:
        """Encodes the beginning of a ChatML turn, to which text can be appended.

        Raises:
            TokenizerError: if the role is unknown, or the checkpoint does not speak ChatML.
        """
        if role not in ROLES:
            raise TokenizerError(f"role {printable(repr(role))} is not one of {', '.join(ROLES)}")
        return [self.control("<|im_start|>"), *self.encode_text(f"{role}\n{content}")]

    def open_answer(self) -> list[int]:
        """Returns the ids that open the assistant's turn."""
        return [self.control("<|im_start|>"), *self.encode_text("assistant\n")]

    def close_turn(self) -> list[int]:
        """Returns the ids that end a turn, also the assistant's."""
        return [self.control("<|im_end|>"), *self.encode_text("\n")]

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Encodes a conversation in ChatML, with the checkpoint's default system prompt.

        Args:
            messages: `{"role": ..., "content": ...}`; the default system prompt is put
                before them unless the first one is a system message.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            TokenizerError: if a message is malformed, or the checkpoint has no chat
                template or one that is not ChatML.
        """
        if not messages:
            raise TokenizerError("a conversation needs at least one message")
        for message in messages:
            if message.keys() != {"role", "content"}:
                names = printable(", ".join(map(str, message)))
                raise TokenizerError(f"a message has 'role' and 'content', got {names}")
            if not isinstance(message["content"], str):
                raise TokenizerError("the content of a message must be a text")
        if messages[0]["role"] == "system":
            ids, messages = self.open_chat(messages[0]["content"]), messages[1:]
        else:
            ids = self.open_chat()
        for message in messages:
            ids += self.encode_turn(message["role"], message["content"])
        return ids + self.open_answer() if add_generation_prompt else ids

    def open_chat(self, system: str | None = None) -> list[int]:
        """Encodes the system turn that a conversation begins with; [] if there is none.

        Args:
            system: system prompt; None for the checkpoint's own.

        Raises:
            TokenizerError: if the checkpoint's chat template would not give these ids.
        """
        opening = "user" if system is None else "system"
        self._check_kind(kind([{"role": opening, "content": system or ""}]))
        text = self.chat.default if system is None else system
        return [] if text is None else self.encode_turn("system", text)

    def check_chatml(self) -> None:
        """Checks that conversations, at least those with a system prompt, are ChatML.

        Raises:
            TokenizerError: if there is no chat template, or one of another format.
        """
        self._check_kind(GIVEN)

    def _check_kind(self, which: str) -> None:
        if self.template is None:
            raise TokenizerError(
                f"{shown(self.directory)} has no chat template (chat_template.jinja, or "
                "chat_template in tokenizer_config.json): it is a base model, use `generate`"
            )
        for each in (GIVEN, which):
            if each in self.chat.faults:
                raise TokenizerError(
                    f"{shown(self.directory)}: the chat template is not plain ChatML: "
                    f"{printable(self.chat.faults[each])}; {_WAYS_OUT[each]}"
                )

    @functools.cached_property
    def chat(self) -> Chat:
        """Comparison of the chat template with the ids that this class produces."""
        chat = examine(self.template or "", self.names)
        faults = dict(chat.faults)
        if self.turns_fault is not None:
            faults.setdefault(GIVEN, self.turns_fault)
        for content, token in self.added.items():
            if token in self.control_ids and content in (chat.default or ""):
                faults[NONE] = f"its system text holds the control token {content}"
        return Chat(chat.default, faults)

    def _compare_turns(self) -> str | None:
        """Returns why the library encodes ChatML conversations differently; None if it does not."""
        if not self.added.keys() >= {"<|im_start|>", "<|im_end|>"}:
            return "the tokenizer has no added tokens <|im_start|> and <|im_end|>"
        contents = ["x", " x ", "", "\n", "\u0301x\n"]
        turns = [{"role": role, "content": each} for each in contents for role in ROLES]
        try:
            ids = [i for turn in turns for i in self.encode_turn(turn["role"], turn["content"])]
            self.model.encode_special_tokens = False
            found = self.model.encode(chatml(turns, None, False), add_special_tokens=False).ids
        except TokenizerError as error:
            return str(error)
        finally:
            self.model.encode_special_tokens = True
        return None if found == ids else "added tokens take in text around or between its markers"

    def control(self, content: str) -> int:
        """Returns the id of an added token.

        Raises:
            TokenizerError: if the tokenizer has none of that name.
        """
        if content not in self.added:
            path = shown(self.directory / "tokenizer.json")
            raise TokenizerError(f"{path} has no added token {content}: it does not speak ChatML")
        return self.added[content]

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """Returns the bytes that a token adds to the text: none for special and unknown ids."""
        if token in self.special:
            return b""
        if token in self.contents:
            return self.contents[token].encode("utf-8")
        content = self.model.id_to_token(token) if token >= 0 else None
        if content is None:
            return b""
        alphabet = tokenizer_file.byte_alphabet()
        try:
            return bytes([alphabet[character] for character in content])
        except KeyError:  # no word of byte-level BPE: it stands for itself
            return content.encode("utf-8")


def check_stop(text: str) -> None:
    """Checks that a text is valid as a stop string.

    Raises:
        TokenizerError: if it is empty, has over `STOP_CHARS` characters, or a lone surrogate,
            which no answer has.
    """
    if not 0 < len(text) <= STOP_CHARS:
        raise TokenizerError(
            f"a stop string has 1 to {STOP_CHARS:,} characters, this one has {len(text):,}"
        )
    if not text.isascii() and any("\ud800" <= each <= "\udfff" for each in text):
        raise TokenizerError(f"the stop string {printable(text, 60)} is not valid Unicode")


class Stream:
    """Streaming decoder: emits no partial characters, and nothing of a possible stop string.

    All pushes and the finish together return `decode` of all ids, cut before the
    stop string that is the first to be complete.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()):
        """Starts an empty text.

        Args:
            stop: stop strings.

        Raises:
            TokenizerError: if a stop string is invalid.
        """
        for each in stop:
            check_stop(each)
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, ids: Iterable[int]) -> str:
        """Adds ids; returns the text that is now certain."""
        return self._release(b"".join(map(self._tokenizer.piece, ids)), final=False)

    def finish(self) -> str:
        """Returns the text that was held back, at the end of the ids."""
        return self._release(b"", final=True)

    def _release(self, data: bytes, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + self._bytes.decode(data, final)
        # The occurrence that ends first, so that the cut does not depend on how ids are grouped.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest proper prefix of `stop` that ends `text`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
