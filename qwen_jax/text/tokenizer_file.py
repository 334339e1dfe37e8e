"""Tokenizer files, checked field by field: what is not known to be harmless is refused."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import tokenizers
from msgspec import Meta, Struct

from qwen_jax.files import limited, reading, schema
from qwen_jax.files.reading import json_kind, printable, shown
from qwen_jax.text import pattern_probe
from qwen_jax.text.chat_template import SPECIAL_NAMES, TEMPLATE_BYTES


class TokenizerError(ValueError):
    """Error of a text, message or tokenizer file that cannot be used, with the remedy."""


WORDS, WORD_CHARS = 1 << 20, 4096
"""Maximum number of words of a vocabulary, added tokens included, and of characters of a word."""
ADDED_TOKENS = 1 << 16
"""Maximum number of added tokens."""
STEPS = 16
"""Maximum number of steps of a normalizer or pre-tokenizer."""
NORMALIZERS = ("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents")
"""Allowed normalizers; they make a text at most 11 times as long (NFKD of U+FDFA)."""
PRE_TOKENIZERS = ("Sequence", "Split", "Digits", "ByteLevel")
AROUND = 16
"""Maximum number of tokens that a post-processor may add to a text."""

QWEN_CONTROLS = frozenset(
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <tool_response> </tool_response> <think> "
    "</think> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
    "<|file_sep|>".split()
)
"""Qwen's added tokens, which are control tokens whatever the files say."""

KNOWN_PATTERNS = frozenset(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
)
"""Patterns known to take linear time: Qwen's and Llama 3's. Others are tried in a child."""
PATTERN_SECONDS = 30
"""CPU time in seconds for trying a pre-tokenizer with other patterns."""

_Id = Annotated[int, Meta(ge=0, lt=WORDS)]


class _Model(Struct):
    """The part of a model that is checked here; the library checks the rest."""

    vocab: Annotated[
        dict[Annotated[str, Meta(max_length=WORD_CHARS)], _Id],
        Meta(min_length=1, max_length=WORDS),
    ]


class _File(Struct):
    """A file, of which the model alone is read."""

    model: _Model


class _Token(schema.Record, frozen=True):
    """An added token."""

    id: _Id
    content: Annotated[str, Meta(min_length=1, max_length=WORD_CHARS)]
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class _AddedTokens(Struct):
    added_tokens: Annotated[list[_Token], Meta(max_length=ADDED_TOKENS)]


_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Content of `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

    `special_tokens_map.json` and `added_tokens.json` are used, as in transformers, only if
    `tokenizer_config.json` has no `added_tokens_decoder`.

    Attributes:
        model: the library's tokenizer, whose control tokens are its special ones; it neither
            truncates nor pads nor adds tokens.
        added: ids of the added tokens by content.
        contents: content, by id, of added tokens that are not in the vocabulary.
        control: contents of added tokens that text is never encoded to.
        special: contents of added tokens that decoding leaves out.
        size: one more than the largest id in use.
        names: special tokens by their names in templates, as far as the files define them.
        template: the chat template, or None.
        before: ids that the post-processor puts before a raw prompt.
        after: ids that it puts after a raw prompt.
        cuttable: whether texts may be encoded in pieces, see `pieces.cut`.
    """

    model: tokenizers.Tokenizer
    added: Mapping[str, int]
    contents: Mapping[int, str]
    control: frozenset[str]
    special: frozenset[str]
    size: int
    names: Mapping[str, str | None]
    template: str | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    cuttable: bool


def read(directory: Path) -> Files:
    """Reads and checks the files of a tokenizer.

    Raises:
        TokenizerError: naming the file and the field that cannot be used.
    """
    path = directory / "tokenizer.json"
    if not os.path.lexists(path):
        raise TokenizerError(f"{shown(path)} is missing: text needs it, ids do not")
    raw = reading.read_object(path, error=TokenizerError)
    settings = directory / "tokenizer_config.json"
    config = _object(settings)
    template = _template(directory, settings, config)
    try:
        words = _check_model(raw.get("model"))
        _check_steps("normalizer", raw.get("normalizer"), NORMALIZERS)
        _check_steps("pre_tokenizer", raw.get("pre_tokenizer"), PRE_TOKENIZERS)
        _check_kind("decoder", raw.get("decoder"), ("ByteLevel",))
        added = _added(raw.get("added_tokens"))
    except (TokenizerError, schema.SchemaError) as error:
        raise TokenizerError(f"{shown(path)}: {error}") from None
    _check_switches(settings, config, raw["pre_tokenizer"])
    sources = {settings: config}
    if "added_tokens_decoder" in config:
        _compare_tokens(settings, config["added_tokens_decoder"], added)
    else:
        named = directory / "special_tokens_map.json"
        sources[named] = _object(named)
        _compare_ids(directory / "added_tokens.json", added)
    names = _names(sources, added)
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
    model = guarded(shown(path), tokenizers.Tokenizer.from_str, json.dumps(raw))
    for content, token in added.items():
        if model.token_to_id(content) != token["id"]:
            raise TokenizerError(
                f"{shown(path)}: added_tokens: {printable(content, 60)!r} has the id "
                f"{token['id']}, in this place of the list it must be {model.token_to_id(content)}"
            )
    model.encode_special_tokens = True
    size = 1 + max([*words.values(), *(token["id"] for token in added.values())])
    before, after = _remove_post_processor(path, model, size)
    return Files(
        model=model,
        added={content: token["id"] for content, token in added.items()},
        contents={token["id"]: content for content, token in added.items() if content not in words},
        control=control,
        special=frozenset(content for content, token in added.items() if token["special"]),
        size=size,
        names=names,
        template=template,
        before=before,
        after=after,
        cuttable=control == added.keys() and _is_cuttable(raw),
    )


def guarded(where: str, function: Any, *arguments: Any, **flags: Any) -> Any:
    """Calls the library, whose panics in Rust are no `Exception`.

    Args:
        where: beginning of the error.

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
    """Checks the model of a tokenizer; returns its vocabulary."""
    _check_kind("model", model, ("BPE",))
    vocab = schema.read({"model": model}, _File).model.vocab
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
    """Checks that a normalizer or pre-tokenizer has only known steps, and at most `STEPS`."""
    steps = [] if step is None else list(_steps(name, step, kinds))
    if len(steps) > STEPS:
        raise TokenizerError(f"{name} has {len(steps):,} steps, more than the {STEPS} allowed")
    if name == "pre_tokenizer" and [each["type"] for each in steps][-1:] != ["ByteLevel"]:
        raise TokenizerError("pre_tokenizer must end with ByteLevel, as Qwen2.5's does")


def _try_patterns(path: Path, pre_tokenizer: dict[str, Any]) -> None:
    """Tries a pre-tokenizer with unknown patterns on hard texts, in a child process.

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


def _is_cuttable(raw: dict[str, Any]) -> bool:
    """Returns True for a normalizer and pre-tokenizer that `pieces.cut` knows."""
    if (raw.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        return False
    *splits, last = _steps("pre_tokenizer", raw["pre_tokenizer"], PRE_TOKENIZERS)
    known = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in KNOWN_PATTERNS
    ]
    flags = last.get("add_prefix_space", True), last.get("use_regex", True)
    return len(splits) == 1 and splits[0] in known and flags == (False, False)


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
    """Checks the added tokens; returns them by content."""
    if tokens is None:
        return {}
    schema.read({"added_tokens": tokens}, _AddedTokens)
    found = {token["content"]: token for token in tokens}
    if len(found) < len(tokens) or len({token["id"] for token in tokens}) < len(tokens):
        raise TokenizerError("added_tokens has a token twice, or gives one id to two tokens")
    return found


def _object(path: Path) -> dict[str, Any]:
    """Reads the fields of a JSON file; {} if it does not exist."""
    return reading.read_object(path, error=TokenizerError) if os.path.lexists(path) else {}


def _names(
    sources: Mapping[Path, dict[str, Any]], added: dict[str, dict[str, Any]]
) -> dict[str, str | None]:
    """Returns special tokens by name; sets `special` of the added tokens, as transformers does.

    Args:
        sources: fields of files, of which later ones take precedence.

    Raises:
        TokenizerError: if a name is no text, or its token is not in `tokenizer.json`.
    """
    names: dict[str, str | None] = {}
    said = {name: (path, each[name]) for path, each in sources.items() for name in each}
    for name, (path, value) in said.items():
        content = _content(value)
        listed: Iterable[Any] = ()
        if name in SPECIAL_NAMES:
            if not (isinstance(content, str) or (value is None and content is None)):
                raise TokenizerError(f"{shown(path)}: {name} must be a text, got {_value(value)}")
            names[name] = content
            listed = () if content is None else (content,)
        elif name.endswith("_token") and isinstance(content, str):
            names[name] = content  # a model's own, such as image_token
            listed = (content,)
        elif name in _LISTS and isinstance(value, dict | list):
            listed = map(_content, value.values() if isinstance(value, dict) else value)
        for each in listed:
            if not isinstance(each, str) or each not in added:
                raise TokenizerError(
                    f"{shown(path)}: {name} names {_value(each)}, which is not among the "
                    "added_tokens of tokenizer.json: add it there, or do not name it"
                )
            added[each]["special"] = True
    return names


def _content(value: Any) -> Any:
    """Returns the content of a token, which files give alone or with its flags."""
    return value.get("content") if isinstance(value, dict) else value


def _compare_tokens(path: Path, decoder: Any, added: dict[str, dict[str, Any]]) -> None:
    """Sets `special` of the added tokens from the settings, as transformers does.

    Raises:
        TokenizerError: if the settings list other tokens, or other flags for matching them.
    """
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
    for number in sorted(by_id.keys() - decoder.keys()):
        raise TokenizerError(
            f"{shown(path)}: added_tokens_decoder lacks token {number}, "
            f"{printable(by_id[number]['content'], 60)!r}, of tokenizer.json: list all or none"
        )


def _compare_ids(path: Path, added: dict[str, dict[str, Any]]) -> None:
    """Checks that `added_tokens.json` agrees with `tokenizer.json`.

    Raises:
        TokenizerError: if it gives a token another id.
    """
    for content, number in _object(path).items():
        if content not in added or added[content]["id"] != number:
            raise TokenizerError(
                f"{shown(path)}: {printable(content, 60)!r} has not the id {_value(number)} in "
                "tokenizer.json: make the files agree, or remove this older one"
            )


def _remove_post_processor(
    path: Path, model: tokenizers.Tokenizer, size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Removes the post-processor; returns the ids that it puts before and after a text.

    Raises:
        TokenizerError: if it does more than that.
    """
    where = shown(path)
    probes = ("a", "a b c")
    whole = [guarded(where, model.encode, text) for text in probes]
    model.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    bare = [guarded(where, model.encode, text).ids for text in probes]
    start = [*whole[0].special_tokens_mask, 0].index(0)
    before, after = whole[0].ids[:start], whole[0].ids[start + len(bare[0]) :]
    for text, encoded in zip(bare, whole, strict=True):
        if encoded.ids != before + text + after or (encoded.ids and not text):
            raise TokenizerError(f"{where}: post_processor does not keep the text once, as it is")
    if len(before + after) > AROUND or max(before + after, default=0) >= size:
        raise TokenizerError(
            f"{where}: post_processor adds {len(before + after):,} tokens up to "
            f"{max(before + after)}: it may add {AROUND}, with ids under {size}"
        )
    return tuple(before), tuple(after)


def _check_switches(path: Path, config: dict[str, Any], pre_tokenizer: dict[str, Any]) -> None:
    """Checks that no setting changes the tokens of `tokenizer.json`.

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


def _template(directory: Path, path: Path, config: dict[str, Any]) -> str | None:
    """Reads the chat template, from its own file or from the settings; None if there is none."""
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
    """Maps the characters of byte-level BPE to bytes (GPT-2's `bytes_to_unicode`, inverted)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
