"""Prompts of flags: text, files of text, and of token ids."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.files import reading
from qwen_jax.files.reading import printable, shown
from qwen_jax.llm.documents import read_text

_LARGEST_BYTES = 1 << 27  # over ten million ids


def one_of(flags: Mapping[str, Any]) -> str:
    """The name of the only flag that has a value.

    Raises:
        ConfigError: if none has one, or several have.
    """
    given = [flag for flag, value in flags.items() if value]
    if len(given) != 1:
        raise ConfigError(f"give one of {', '.join(flags)}, not {' and '.join(given) or 'none'}")
    return given[0]


def prompt(text: str | None, file: Path | None, ids: Path | None, vocab_size: int) -> Any:
    """A text, that of a file, or token ids; process 0 reads files for all.

    Raises:
        ConfigError: if it is empty, or of token ids see `read`.
        DocumentError: if the file holds no text.
    """
    if ids is not None:
        return read(ids, vocab_size)
    found = text if file is None else multihost.broadcast_json(lambda: read_text(file))
    if not found:
        raise ConfigError(f"{shown(file or 'the prompt')} is empty: give at least one character")
    return found


def read(path: Path, vocab_size: int) -> Sequence[int]:
    """The token ids in a file or pipe, which process 0 reads for all.

    Raises:
        ConfigError: if it cannot be read, or naming the first item that is no id of the model's
            vocabulary.
    """
    return tuple(multihost.broadcast_json(lambda: _read(path, vocab_size)))


def _read(path: Path, vocab_size: int) -> list[int]:
    text = reading.read_text(path, limit=_LARGEST_BYTES, error=ConfigError, pipes=True)
    try:
        items = reading.parse_json(text) if text.lstrip().startswith("[") else _words(text)
    except ValueError as error:
        raise ConfigError(
            f"{shown(path)} begins like a JSON list but is none: {printable(error)}"
        ) from None
    if not items:
        raise ConfigError(f"{shown(path)} is empty: give at least one token id")
    return [_id(path, index, item, vocab_size) for index, item in enumerate(items)]


def _words(text: str) -> list[int | str]:
    return [int(word) if re.fullmatch("[0-9]{1,19}", word) else word for word in text.split()]


def _id(path: Path, index: int, item: object, vocab_size: int) -> int:
    if type(item) is not int or not 0 <= item < vocab_size:
        raise ConfigError(
            f"{shown(path)}: item {index} is {printable(_spelled(item), 40)}, not a token id from "
            f"0 to {vocab_size - 1}"
        )
    return item


def _spelled(item: object) -> str:
    if isinstance(item, (dict, list)):
        return reading.json_kind(item)
    return repr(item[:60] if isinstance(item, str) else item)
