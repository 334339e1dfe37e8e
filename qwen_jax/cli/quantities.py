"""Parsers of quantities: tokens with K and M, bytes with units."""

import re
from typing import Any

import typer

from qwen_jax.config import ConfigError
from qwen_jax.files.reading import printable

_TOKENS = {"": 1, "k": 1000, "m": 1000**2, "K": 1024, "M": 1024**2}
_BYTES = {
    prefix + suffix: base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}


def whole_number(text: str) -> int:
    """Parses a number of tokens: 12000, 12k (thousands), 12K (of 1,024), 1m, 1M.

    Raises:
        ConfigError: if it is not a positive integer under 2^31.
    """
    number = _number(text)
    if number is None or not 1 <= number < 2**31:
        raise ConfigError(
            f"length '{printable(text, 40)}' must be tokens such as 12000, 12k or 12K, "
            "at least 1 and under 2^31"
        )
    return number


def lengths(text: str) -> list[int]:
    """Parses comma-separated numbers of tokens, the value of `--lengths`.

    Raises:
        ConfigError: if one is missing or invalid (`whole_number`).
    """
    values = split("--lengths", text)
    try:
        return [whole_number(each) for each in values]
    except ConfigError as error:
        raise ConfigError(f"--lengths: {error}") from None


def split(flag: str, text: str) -> list[str]:
    """Splits comma-separated values.

    Raises:
        ConfigError: if one is empty.
    """
    values = [value.strip() for value in text.split(",")]
    if not all(values):
        raise ConfigError(f"{flag} {text!r} must be values with commas between them")
    return values


def tokens(text: str | int) -> int:
    """Parses the number of tokens of a flag as `whole_number`, without checking its range.

    Raises:
        BadParameter: if it is malformed.
    """
    number = _number(str(text))
    if number is None:
        raise typer.BadParameter(
            f"'{printable(text, 40)}' is no number of tokens, such as 12000, 128K (of 1,024) or "
            "1M (1,048,576)"
        )
    return number


def _number(text: str) -> int | None:
    match = re.fullmatch(r"(-?[0-9]{1,18})([kKmM]?)", text.strip())
    return match and int(match[1]) * _TOKENS[match[2]]


def size(text: str | int) -> int:
    """Parses a number of bytes: 40GiB (of 2^30), 40GB (of 10^9), likewise with M and T.

    Raises:
        BadParameter: if it is malformed.
    """
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?([KMGT]i?B)", str(text).strip())
    if match is None or not float(match[1]):
        raise typer.BadParameter(
            f"'{printable(text, 40)}' is no number of bytes, such as 40GiB or 80GB"
        )
    return int(float(match[1]) * _BYTES[match[2]])


def tokens_option(text: str, *names: str, shown: bool = False) -> Any:
    """Declares a flag whose value is a number of tokens.

    Args:
        shown: whether the help shows its default.
    """
    return typer.Option(*names, help=text, parser=tokens, metavar="TOKENS", show_default=shown)
