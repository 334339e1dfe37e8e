"""Files of token ids: a JSON list, or integers between white space."""

import re
from pathlib import Path

from qwen_jax.config import ConfigError
from qwen_jax.files import reading
from qwen_jax.files.reading import printable, shown

_LARGEST_BYTES = 1 << 27  # over ten million ids


def read(path: Path, vocab_size: int) -> tuple[int, ...]:
    """Reads token ids from a file or pipe.

    Raises:
        ConfigError: if it cannot be read, or naming the first item that is no id of the model's
            vocabulary.
    """
    text = reading.read_text(path, limit=_LARGEST_BYTES, error=ConfigError, pipes=True)
    try:
        items = reading.parse_json(text) if text.lstrip().startswith("[") else _words(text)
    except ValueError as error:
        raise ConfigError(
            f"{shown(path)} begins like a JSON list but is none: {printable(error)}"
        ) from None
    if not items:
        raise ConfigError(f"{shown(path)} is empty: give at least one token id")
    return tuple(_id(path, index, item, vocab_size) for index, item in enumerate(items))


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
