"""Text <-> ids: no control tokens from text, ChatML by pieces, streaming decode.

One file over the usual length, because all of it is one promise: control tokens
come from the renderer and text from text, in both directions.
"""

import codecs
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers


class TokenizerError(ValueError):
    """Text, a message or a tokenizer file that cannot be used, by name, and the way out."""


ROLES = ("system", "user", "assistant")
"""Roles that a message may have: they reach the prompt, so the set is closed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A byte-level BPE tokenizer whose text never becomes a control token.

    Attributes:
        directory: where the files came from; named in errors.
        model: encodes text. It was built without the added tokens, so no text
            can match one.
        added: ids of the added tokens (`<|im_end|>`, `<tool_call>`, ...) by content.
        contents: the same, the other way round.
        special: ids among them that decoding leaves out.
        size: one more than the largest id that means something; ids from here on
            are padding of the embedding.
        eos: id that ends an answer, or None if the files name none.
        template: the checkpoint's chat template, or None.
    """

    directory: Path
    model: tokenizers.Tokenizer
    added: Mapping[str, int]
    contents: Mapping[int, str]
    special: frozenset[int]
    size: int
    eos: int | None
    template: str | None

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer":
        """The tokenizer of a Hugging Face directory or of a converted checkpoint.

        Raises:
            TokenizerError: if `tokenizer.json` is missing or malformed, or is not byte-level.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        raw = _read_json(path)
        added = raw.get("added_tokens") or []
        try:
            ids = {token["content"]: token["id"] for token in added}
            special = frozenset(token["id"] for token in added if token["special"])
            kind = raw["decoder"]["type"]
        except (KeyError, TypeError) as error:
            raise TokenizerError(f"{path} lacks {error} in added_tokens or decoder") from None
        if kind != "ByteLevel":
            raise TokenizerError(f"{path}: decoder {kind!r} is not 'ByteLevel', as Qwen2.5's is")
        # Added tokens would match in text, truncation would drop some of it in silence.
        raw |= {"added_tokens": [], "truncation": None, "padding": None}
        try:
            model = tokenizers.Tokenizer.from_str(json.dumps(raw))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path} is not a usable tokenizer: {error}") from None
        settings = directory / "tokenizer_config.json"
        config = _read_json(settings) if settings.exists() else {}
        eos = config.get("eos_token")
        return cls(
            directory=directory,
            model=model,
            added=ids,
            contents={token: content for content, token in ids.items()},
            special=special,
            size=1 + max([*model.get_vocab().values(), *ids.values()], default=-1),
            eos=ids.get(eos.get("content") if isinstance(eos, dict) else eos),
            template=_template(directory, config),
        )

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of all added tokens: none of them comes from text."""
        return frozenset(self.contents)

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text`, never a control id: `<|im_end|>` in it is ten ordinary characters.

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
        ids = self.model.encode(text, add_special_tokens=False).ids
        forged = self.control_ids.intersection(ids)
        if forged:
            raise TokenizerError(
                f"{self.directory / 'tokenizer.json'} makes control token {min(forged)} out of "
                "plain text: its vocabulary can be spelled, do not use it"
            )
        return ids

    def encode_turn(self, role: str, content: str) -> list[int]:
        """Ids of one ChatML turn; its control tokens are placed here, never parsed from text.

        Raises:
            TokenizerError: if the role is unknown, or the checkpoint does not speak ChatML.
        """
        return [*self.open_turn(role, content), *self.close_turn()]

    def open_turn(self, role: str, content: str) -> list[int]:
        """Ids of a ChatML turn that may still go on.

        Raises:
            TokenizerError: if the role is unknown, or the checkpoint does not speak ChatML.
        """
        if role not in ROLES:
            raise TokenizerError(f"role {role!r} is not one of {', '.join(ROLES)}")
        return [self.control("<|im_start|>"), *self.encode_text(f"{role}\n{content}")]

    def open_answer(self) -> list[int]:
        """Ids that invite the model to speak."""
        return [self.control("<|im_start|>"), *self.encode_text("assistant\n")]

    def close_turn(self) -> list[int]:
        """Ids that end a turn, the model's included."""
        return [self.control("<|im_end|>"), *self.encode_text("\n")]

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation in ChatML, with the checkpoint's own default system text.

        Args:
            messages: `{"role": ..., "content": ...}`; the default system text is put
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
                raise TokenizerError(f"a message has 'role' and 'content', got {sorted(message)}")
        self.check_chatml()
        opening = None if messages[0]["role"] == "system" else self.default_system()
        ids = [] if opening is None else self.encode_turn("system", opening)
        for message in messages:
            ids += self.encode_turn(message["role"], message["content"])
        return ids + self.open_answer() if add_generation_prompt else ids

    def check_chatml(self) -> None:
        """Checks that the checkpoint's chat template is plain ChatML.

        Raises:
            TokenizerError: if there is no template, or one of another format.
        """
        if self.template is None:
            raise TokenizerError(
                f"{self.directory} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): it is a base model, use `generate`"
            )
        if "<|im_start|>" not in self.template or "<|im_end|>" not in self.template:
            raise TokenizerError(
                f"{self.directory}: the chat template is not ChatML (<|im_start|> ... <|im_end|>); "
                "use `generate`"
            )
        for opening in re.finditer(r"<\|im_start\|>assistant(?:\n|\\n)", self.template):
            text = self.template[opening.end() : opening.end() + 20]
            if not text.startswith(("'", '"', "{")) and text:
                raise TokenizerError(
                    f"{self.directory}: the chat template puts {text!r} into the model's mouth; "
                    "only plain ChatML is supported, use `generate`"
                )

    def default_system(self) -> str | None:
        """The system text that the chat template inserts, or None if it inserts none.

        It is read off as a literal. Nothing is executed: a template is a program,
        and checkpoints are downloaded.

        Raises:
            TokenizerError: if the text is not a plain literal.
        """
        for match in re.finditer(r"<\|im_start\|>system(?:\n|\\n)", self.template or ""):
            literal = match.string[match.end() :].partition("<|im_end|>")[0]
            if literal.startswith(("'", '"', "{")):
                continue  # the conversation's own system text goes here
            if not re.fullmatch(r"""(?:[^'"\\{]|\\[n'"\\]|\{(?![{%#]))*""", literal):
                raise TokenizerError(
                    f"{self.directory}: the default system text of the chat template is not a "
                    f"plain literal ({literal[:40]!r}): give a system text of your own"
                )
            return re.sub(r"\\(.)", lambda escape: {"n": "\n"}.get(escape[1], escape[1]), literal)
        return None

    def control(self, content: str) -> int:
        """Id of an added token.

        Raises:
            TokenizerError: if the tokenizer has none of that name.
        """
        if content not in self.added:
            path = self.directory / "tokenizer.json"
            raise TokenizerError(f"{path} has no added token {content}: it does not speak ChatML")
        return self.added[content]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """Bytes that a token adds to the text: none for special and unknown ids."""
        if token in self.special:
            return b""
        content = self.contents.get(token)
        if content is None:
            content = self.model.id_to_token(token) if token >= 0 else None
        if content is None:
            return b""
        alphabet = _byte_alphabet()
        try:
            return bytes([alphabet[character] for character in content])
        except KeyError:  # an added token outside the byte alphabet stands for itself
            return content.encode("utf-8")


class Stream:
    """Text of ids as they come: never half a character, never the beginning of a stop string.

    All pushes and the finish together give `decode` of all ids, cut before the
    stop string that is the first to be complete.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()):
        """Begin an empty text.

        Raises:
            TokenizerError: if a stop string is empty.
        """
        if not all(stop):
            raise TokenizerError("a stop string must not be empty")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, ids: Iterable[int]) -> str:
        """Text that became certain with these ids."""
        return self._release(b"".join(map(self._tokenizer.piece, ids)), final=False)

    def finish(self) -> str:
        """Text that was held back."""
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


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    """The chat template: its own file, else tokenizer_config.json, where it may have a name."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return _read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{directory / 'tokenizer_config.json'}: chat_template is not text")
    return template


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Characters by which byte-level BPE writes bytes (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise TokenizerError(f"{path} is missing: text needs it, ids do not") from None
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
