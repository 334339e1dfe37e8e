"""Checks of parsed JSON against what a file may hold; errors name the first field at fault.

A check is a function of a field's name and its value. Small ones are put together:

    shard = fields(file=matching(NAME, "the name of a file"), header=text)
    check("shards", body["shards"], items(shard))   # ... shards[2].file must be the name of ...
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from qwen_jax.files.reading import json_kind, printable

Check = Callable[[str, Any], None]


class SchemaError(ValueError):
    """A value that a file must not hold; the text names its field."""


def anything(where: str, value: Any) -> None:
    """Accept every value."""


def text(where: str, value: Any) -> None:
    """Accept texts."""
    if type(value) is not str:
        raise wrong(where, "a text", value)


def truth(where: str, value: Any) -> None:
    """Accept true and false."""
    if type(value) is not bool:
        raise wrong(where, "true or false", value)


def whole(low: int, high: int) -> Check:
    """Accept integers from `low` to `high`."""

    def check(where: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise wrong(where, f"an integer from {low} to {high}", value)

    return check


def number(low: float | int, high: float | int) -> Check:
    """Accept finite numbers from `low` to `high`."""

    def check(where: str, value: Any) -> None:
        fits = type(value) in (int, float) and low <= value <= high and math.isfinite(value)
        if not fits:
            raise wrong(where, f"a number from {low:g} to {high:g}", value)

    return check


def matching(pattern: re.Pattern[str], words: str) -> Check:
    """Accept texts that a pattern matches from end to end.

    Args:
        words: description of such a text in errors, such as "a SHA-256".
    """

    def check(where: str, value: Any) -> None:
        if type(value) is not str or not pattern.fullmatch(value):
            raise wrong(where, words, value)

    return check


sha256 = matching(re.compile("[0-9a-f]{64}"), "a SHA-256 of 64 hexadecimal digits")
"""Accept checksums."""


def one_of(*known: str) -> Check:
    """Accept some texts."""

    def check(where: str, value: Any) -> None:
        if type(value) is not str or value not in known:
            raise wrong(where, " or ".join(map(repr, known)), value)

    return check


def maybe(inner: Check) -> Check:
    """Accept null too."""

    def check(where: str, value: Any) -> None:
        if value is not None:
            inner(where, value)

    return check


def items(inner: Check, *, least: int = 0) -> Check:
    """Accept lists of at least `least` values that pass a check."""

    def check(where: str, value: Any) -> None:
        if type(value) is not list or len(value) < least:
            raise wrong(where, f"a list of at least {least}" if least else "a list", value)
        for index, each in enumerate(value):
            inner(f"{where}[{index}]", each)

    return check


def values(inner: Check, *, key: Check = text) -> Check:
    """Accept objects whose values, and keys, pass a check."""

    def check(where: str, value: Any) -> None:
        if type(value) is not dict:
            raise wrong(where, "an object", value)
        for name, each in value.items():
            key(f"a key of {where}", name)
            inner(f"{where}[{printable(repr(name), 80)}]", each)

    return check


def fields(*, optional: Mapping[str, Check] | None = None, **required: Check) -> Check:
    """Accept objects with exactly these fields, those of `optional` left out or not."""
    known = {**required, **(optional or {})}

    def check(where: str, value: Any) -> None:
        if type(value) is not dict:
            raise wrong(where or "it", "an object", value)
        prefix = f"{where}." if where else ""
        for name in required:
            if name not in value:
                raise SchemaError(f"{prefix}{name} is missing")
        for name, each in value.items():
            if name not in known:
                raise SchemaError(f"{prefix}{printable(name, 80)} is no field of it")
            known[name](f"{prefix}{name}", each)

    return check


def wrong(where: str, words: str, value: Any) -> SchemaError:
    """The error for a value that is not what `words` say."""
    simple = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    shown = printable(repr(value), 80) if simple else json_kind(value)
    return SchemaError(f"{where} must be {words}, got {shown}")
