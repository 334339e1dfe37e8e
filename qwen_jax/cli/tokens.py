"""Files of token ids: a JSON list, or integers between white space."""

import json
from pathlib import Path

from qwen_jax.config import ConfigError


def read(path: Path, vocab_size: int) -> tuple[int, ...]:
    """The token ids in a file.

    Raises:
        OSError: if it cannot be read.
        ConfigError: naming the first item that is no id of the model's vocabulary.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        items = json.loads(text) if text.lstrip().startswith("[") else text.split()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text: byte {error.start} is not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} begins like a JSON list but is none: {error}") from None
    if not items:
        raise ConfigError(f"{path} is empty: give at least one token id")
    return tuple(_id(path, index, item, vocab_size) for index, item in enumerate(items))


def _id(path: Path, index: int, item: object, vocab_size: int) -> int:
    number = item
    if isinstance(item, str) and item.lstrip("-").isascii() and item.lstrip("-").isdigit():
        number = int(item) if len(item) < 20 else -1
    if type(number) is not int or not 0 <= number < vocab_size:
        shown = repr(item) if len(repr(item)) <= 40 else f"{repr(item)[:40]}..."
        raise ConfigError(
            f"{path}: item {index} is {shown}, not a token id from 0 to {vocab_size - 1}"
        )
    return number
