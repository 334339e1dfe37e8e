"""The files of a tokenizer, checked field by field: what is not known to be harmless is refused."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from qwen_jax import limited, pattern_probe, reading
from qwen_jax.chat_template import SPECIAL_NAMES, TEMPLATE_BYTES
from qwen_jax.reading import json_kind, printable, shown


class TokenizerError(ValueError):
    """Text, a message or a tokenizer file that cannot be used, by name, and the way out."""


WORDS, WORD_CHARS = 1 << 20, 4096
"""Most words of a vocabulary, added tokens among them, and characters of the longest one."""
ADDED_TOKENS = 1 << 16
"""Most added tokens."""
STEPS = 16
"""Most steps that a normalizer or pre-tokenizer may have."""
NORMALIZERS = ("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents")
"""Normalizers that make a text at most 11 times as long (NFKD of U+FDFA)."""
PRE_TOKENIZERS = ("Sequence", "Split", "Digits", "ByteLevel")

QWEN_CONTROLS = frozenset(
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <tool_response> </tool_response> <think> "
    "</think> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
    "<|file_sep|>".split()
)
"""Names of Qwen's added tokens, which are control tokens whatever a file says of them."""

KNOWN_PATTERNS = frozenset(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
)
"""Patterns of linear time: Qwen's and Llama 3's. Another one is tried, once, in a child."""
PATTERN_SECONDS = 30
"""Processor time for trying a pre-tokenizer with other patterns."""

OTHER_FILES = ("added_tokens.json", "special_tokens_map.json")
"""Files that may name tokens too, by which transformers knows them."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` say.

    Attributes:
        model: the library's tokenizer, whose control tokens are its special ones; it neither cuts
            nor pads nor adds tokens.
        added: ids of the added tokens by content.
        contents: content of those that are no words of the vocabulary, by id.
        control: contents of those that no text may become.
        special: contents of those that decoding leaves out.
        size: one more than the largest id that means something.
        before: ids that the file puts before a text, such as that of a beginning (BOS).
        names: special tokens by the names that templates know them by, as far as they are said.
        template: the chat template, or None.
    """

    model: tokenizers.Tokenizer
    added: Mapping[str, int]
    contents: Mapping[int, str]
    control: frozenset[str]
    special: frozenset[str]
    size: int
    before: tuple[int, ...]
    names: Mapping[str, str | None]
    template: str | None


def read(directory: Path) -> Files:
    """The files of a tokenizer.

    Raises:
        TokenizerError: naming the file and the field that cannot be used.
    """
    path = directory / "tokenizer.json"
    if not os.path.lexists(path):
        raise TokenizerError(f"{shown(path)} is missing: text needs it, ids do not")
    raw = reading.read_object(path, error=TokenizerError)
    settings = directory / "tokenizer_config.json"
    config = _settings(settings)
    names = _names(settings, config)
    template = _template(directory, settings, config)
    try:
        words = _check_model(raw.get("model"))
        _check_steps("normalizer", raw.get("normalizer"), NORMALIZERS)
        _check_steps("pre_tokenizer", raw.get("pre_tokenizer"), PRE_TOKENIZERS)
        _check_kind("decoder", raw.get("decoder"), ("ByteLevel",))
        added = _added(raw.get("added_tokens"))
    except TokenizerError as error:
        raise TokenizerError(f"{shown(path)}: {error}") from None
    _check_switches(settings, config, raw["pre_tokenizer"])
    _compare_tokens(settings, config, added)
    _check_named(directory, config, added)
    for content in names.values():
        if content in added:
            added[content]["special"] = True  # as in transformers
    _try_patterns(path, raw["pre_tokenizer"])
    control = frozenset(
        content
        for content, token in added.items()
        if token["special"]
        or content in QWEN_CONTROLS
        # A template also has ordinary words: "Qwen" in its system text is no marker.
        or (template is not None and not content[0].isalnum() and content in template)
    )
    # To the library, special tokens are those that text does not become.
    raw["added_tokens"] = [
        token | {"special": content in control} for content, token in added.items()
    ]
    raw |= {"truncation": None, "padding": None}
    before = _before(shown(path), raw)
    raw["post_processor"] = None
    model = guarded(shown(path), tokenizers.Tokenizer.from_str, json.dumps(raw))
    for content, token in added.items():
        if model.token_to_id(content) != token["id"]:
            raise TokenizerError(
                f"{shown(path)}: added_tokens: {printable(content, 60)!r} has the id "
                f"{token['id']}, in this place of the list it must be {model.token_to_id(content)}"
            )
    model.encode_special_tokens = True
    return Files(
        model=model,
        added={content: token["id"] for content, token in added.items()},
        contents={token["id"]: content for content, token in added.items() if content not in words},
        control=control,
        special=frozenset(content for content, token in added.items() if token["special"]),
        size=1 + max([*words.values(), *(token["id"] for token in added.values())]),
        before=before,
        names=names,
        template=template,
    )


def _before(where: str, raw: dict[str, Any]) -> tuple[int, ...]:
    """Ids that a tokenizer puts before every text.

    Raises:
        TokenizerError: if it does other things to texts when they are tokens.
    """
    model = guarded(where, tokenizers.Tokenizer.from_str, json.dumps(raw))
    whole, text = (
        guarded(where, model.encode, "x", add_special_tokens=each).ids for each in (True, False)
    )
    if whole[len(whole) - len(text) :] != text:
        raise TokenizerError(
            f"{where}: post_processor puts tokens after every text, where answers are to begin: "
            "remove it"
        )
    return tuple(whole[: len(whole) - len(text)])


def guarded(where: str, function: Any, *arguments: Any, **flags: Any) -> Any:
    """Calls the library, whose accidents in Rust are no `Exception`.

    Raises:
        TokenizerError: if it fails.
    """
    try:
        return function(*arguments, **flags)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{where} is not a usable tokenizer: {printable(error)}") from None
        raise


def _check_model(model: Any) -> dict[str, int]:
    """The vocabulary of a model."""
    _check_kind("model", model, ("BPE",))
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not 0 < len(vocab) <= WORDS:
        raise TokenizerError(f"model.vocab must be an object of 1 to {WORDS:,} words")
    for word, token in vocab.items():
        if type(token) is not int or not 0 <= token < WORDS:
            raise TokenizerError(
                f"model.vocab: {printable(word, 60)!r} must have an id from 0 to {WORDS - 1}, got "
                f"{_value(token)}"
            )
        if len(word) > WORD_CHARS:
            raise TokenizerError(
                f"model.vocab: {printable(word, 60)!r} has {len(word):,} characters, more than the "
                f"{WORD_CHARS:,} allowed"
            )
    if len(set(vocab.values())) < len(vocab):
        raise TokenizerError("model.vocab gives one id to two words")
    if model.get("dropout"):
        raise TokenizerError(
            "model.dropout must be null: it makes other tokens of a text each time"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise TokenizerError(f"model.{name} must be null: byte-level words have none")
    return vocab


def _check_steps(name: str, step: Any, kinds: tuple[str, ...]) -> None:
    """Checks that a normalizer or pre-tokenizer has known steps only, and not too many."""
    steps = [] if step is None else list(_steps(name, step, kinds))
    if len(steps) > STEPS:
        raise TokenizerError(f"{name} has {len(steps):,} steps, more than the {STEPS} allowed")
    if name == "pre_tokenizer" and [each["type"] for each in steps][-1:] != ["ByteLevel"]:
        raise TokenizerError("pre_tokenizer must end with ByteLevel, as Qwen2.5's does")


def _try_patterns(path: Path, pre_tokenizer: dict[str, Any]) -> None:
    """Tries a pre-tokenizer whose patterns nobody knows on hard texts.

    Raises:
        TokenizerError: if it fails, or hangs.
    """
    patterns = [
        step.get("pattern")
        for step in _steps("pre_tokenizer", pre_tokenizer, PRE_TOKENIZERS)
        if step["type"] == "Split"
    ]
    if all(each in [{"Regex": known} for known in KNOWN_PATTERNS] for each in patterns):
        return
    small = {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": byte_alphabet(), "merges": []},
        "pre_tokenizer": pre_tokenizer,
        "added_tokens": [],
    }
    try:
        limited.answer(
            pattern_probe,
            {"tokenizer": small},
            library="tokenizers",
            cpu_seconds=PATTERN_SECONDS,
            cache="patterns",
        )
    except limited.ProbeError as error:
        shown_patterns = printable(", ".join(map(_value, patterns)))
        raise TokenizerError(
            f"{shown(path)}: pre_tokenizer: the pattern {shown_patterns} does not end soon on long "
            f"texts or is broken: {error}"
        ) from None


def _steps(name: str, step: Any, kinds: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    _check_kind(name, step, kinds)
    if step["type"] != "Sequence":
        yield step
        return
    inner = step.get("normalizers" if name == "normalizer" else "pretokenizers")
    if not isinstance(inner, list):
        raise TokenizerError(f"{name}: a Sequence needs a list of steps")
    for each in inner:
        yield from _steps(name, each, kinds)


def _check_kind(name: str, value: Any, kinds: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise TokenizerError(f"{name} must be an object, got {json_kind(value)}")
    if value.get("type") not in kinds:
        raise TokenizerError(
            f"{name} of the type {_value(value.get('type'))} is not known to fit Qwen2.5's family: "
            f"it must be {' or '.join(kinds)}"
        )


def _added(tokens: Any) -> dict[str, dict[str, Any]]:
    """The added tokens by content."""
    if tokens is None:
        return {}
    if not isinstance(tokens, list) or len(tokens) > ADDED_TOKENS:
        raise TokenizerError(f"added_tokens must be a list of at most {ADDED_TOKENS:,} tokens")
    found: dict[str, dict[str, Any]] = {}
    for index, token in enumerate(tokens):
        where = f"added_tokens[{index}]"
        reading.check_fields(where, token, ("id", "content", *_FLAGS), TokenizerError)
        content, number = token["content"], token["id"]
        if not isinstance(content, str) or not 0 < len(content) <= WORD_CHARS:
            raise TokenizerError(
                f"{where}.content must be a text of 1 to {WORD_CHARS:,} characters"
            )
        if type(number) is not int or not 0 <= number < WORDS:
            raise TokenizerError(f"{where}.id must be from 0 to {WORDS - 1}, got {_value(number)}")
        for flag in _FLAGS:
            if not isinstance(token[flag], bool):
                raise TokenizerError(f"{where}.{flag} must be true or false")
        if content in found:
            raise TokenizerError(f"{where}: {printable(content, 60)!r} is there twice")
        found[content] = token
    if len({token["id"] for token in found.values()}) < len(found):
        raise TokenizerError("added_tokens gives one id to two tokens")
    return found


def _settings(path: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, where there is one."""
    return reading.read_object(path, error=TokenizerError) if os.path.lexists(path) else {}


def _names(path: Path, config: dict[str, Any]) -> dict[str, str | None]:
    """Special tokens by name."""
    names: dict[str, str | None] = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name in SPECIAL_NAMES:
            if not (isinstance(content, str) or (value is None and content is None)):
                raise TokenizerError(f"{shown(path)}: {name} must be a text, got {_value(value)}")
            names[name] = content
        elif name.endswith("_token") and isinstance(content, str):
            names[name] = content  # a model's own, such as image_token
    return names


def _compare_tokens(path: Path, config: dict[str, Any], added: dict[str, dict[str, Any]]) -> None:
    """Takes `special` of the added tokens from the settings, as transformers does.

    Raises:
        TokenizerError: if the settings say other tokens, or that they match otherwise.
    """
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict) or len(decoder) > ADDED_TOKENS:
        raise TokenizerError(
            f"{shown(path)}: added_tokens_decoder must be an object of at most {ADDED_TOKENS:,}"
        )
    by_id = {str(token["id"]): token for token in added.values()}
    for number, said in decoder.items():
        said = said if isinstance(said, dict) else {"content": said}
        known = by_id.get(number, {})
        flags = dict.fromkeys(_FLAGS, False) | {"normalized": not said.get("special")} | said
        differs = [name for name in ("content", *_FLAGS[:-1]) if flags.get(name) != known.get(name)]
        if differs or not isinstance(flags["special"], bool):
            raise TokenizerError(
                f"{shown(path)}: added_tokens_decoder: token {printable(number, 30)} has another "
                f"{differs[0] if known and differs else 'meaning'} than in tokenizer.json"
            )
        known["special"] = flags["special"]


def _check_switches(path: Path, config: dict[str, Any], pre_tokenizer: dict[str, Any]) -> None:
    """Checks that the settings do not ask for other tokens than `tokenizer.json`.

    Raises:
        TokenizerError: naming the setting.
    """
    steps = _steps("pre_tokenizer", pre_tokenizer, PRE_TOKENIZERS)
    said = {
        "add_prefix_space": any(step.get("add_prefix_space") for step in steps),
        "split_special_tokens": False,
    }
    for name, there in said.items():
        if config.get(name) and not there:
            raise TokenizerError(
                f"{shown(path)}: {name} makes other tokens than tokenizer.json: set it to false"
            )


def _check_named(
    directory: Path, config: dict[str, Any], added: Mapping[str, Mapping[str, Any]]
) -> None:
    """Checks that tokens which other files name are in `tokenizer.json`.

    To transformers they are tokens wherever they are named; here they would be pieces.

    Raises:
        TokenizerError: naming the file and the token.
    """
    said = {"tokenizer_config.json": config}
    for name in OTHER_FILES:
        if os.path.lexists(directory / name):
            said[name] = reading.read_object(directory / name, error=TokenizerError)
    for name, fields in said.items():
        ids = fields if name == "added_tokens.json" else dict.fromkeys(_contents(fields))
        for content, token in ids.items():
            known = added.get(content, {}).get("id")
            if known is None or token not in (None, known):
                raise TokenizerError(
                    f"{shown(directory / name)}: {printable(content, 60)!r} is another token than "
                    "in tokenizer.json, or is not there: save the tokenizer again with "
                    "transformers, or remove it here"
                )


def _contents(fields: Mapping[str, Any]) -> Iterator[str]:
    """Contents of the tokens that a file names."""
    for name, value in fields.items():
        if not name.endswith(("_token", "_special_tokens")):
            continue
        if isinstance(value, dict) and "content" not in value:
            value = list(value.values())
        for each in value if isinstance(value, list) else [value]:
            content = each.get("content") if isinstance(each, dict) else each
            if isinstance(content, str) and content:
                yield content


def _template(directory: Path, path: Path, config: dict[str, Any]) -> str | None:
    """The chat template, which may have a file of its own, or a name among others."""
    more = directory / "additional_chat_templates" / "default.jinja"
    if os.path.lexists(more):
        raise TokenizerError(
            f"{shown(more)} is not read, though transformers prefers it: put it in the place of "
            "chat_template.jinja"
        )
    own = directory / "chat_template.jinja"
    if os.path.lexists(own):
        return reading.read_text(own, limit=TEMPLATE_BYTES, error=TokenizerError)
    template = config.get("chat_template")
    if isinstance(template, list):
        for entry in template:
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise TokenizerError(f"{shown(path)}: chat_template has an entry without a name")
        template = {entry["name"]: entry.get("template") for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{shown(path)}: chat_template is not text")
    if template is not None and len(template.encode()) > TEMPLATE_BYTES:
        raise TokenizerError(f"{shown(path)}: chat_template has over {TEMPLATE_BYTES:,} bytes")
    return template


def _value(value: Any) -> str:
    return printable(repr(value), 60)


@functools.lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """Characters by which byte-level BPE writes bytes (GPT-2's `bytes_to_unicode`)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
