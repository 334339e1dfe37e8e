r"""Parsed JSON as structs of msgspec; errors name the first field at fault.

class Shard(Record):
    file: Annotated[str, named(r"[\w.-]+", "the name of a file")]

schema.read(body, Manifest)    # ... shards[2].file must be the name of a file
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from qwen_jax.files.reading import printable

FAULT = re.compile(
    r"(?:Object (missing required|contains unknown) field `(.*?)`|(.*?))"
    r"(?: - at (?:`key` in )?`\$\.?(.*)`)?",
    re.DOTALL,
)
"""A message of msgspec: what is wrong with a field and its name, or the fault; then the path."""

_WORDS = {
    "`array`": "a list",
    "`bool`": "true or false",
    "`float`": "a number",
    "`int`": "an integer",
    "`int | float`": "a number",
    "`null`": "null",
    "`object`": "an object",
    "`str`": "a text",
}
_Kind = TypeVar("_Kind")


class SchemaError(ValueError):
    """A value that a file must not hold; the text names its field."""


class Record(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object of JSON that has these fields and no others."""


def named(pattern: str, words: str) -> Meta:
    """A constraint on texts: the pattern matches from end to end, letters being those of ASCII.

    Args:
        words: what such a text is, for errors.
    """
    whole = rf"\A(?a:{pattern})\Z"
    _WORDS[f"`str` matching regex {whole!r}"] = words
    return Meta(pattern=whole)


Sha256 = Annotated[str, named("[0-9a-f]{64}", "a SHA-256 of 64 hexadecimal digits")]
Size = Annotated[int, Meta(ge=0, le=1 << 60)]
Share = Annotated[float, Meta(ge=0, le=1)]


def read(value: Any, kind: type[_Kind] | Any) -> _Kind:
    """The struct in parsed JSON, or another type that msgspec knows.

    Raises:
        SchemaError: naming the first field that is missing, unknown or of another kind.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise SchemaError(printable(_sentence(str(error)), 300)) from None


def _sentence(text: str) -> str:
    found = FAULT.fullmatch(text)
    assert found is not None
    what, name, fault, path = found.groups()
    if what:
        field = f"{path}.{name}" if path else name
        return f"{field} is missing" if what == "missing required" else f"{field} is no field of it"
    where = f"a key of {path}" if "`key` in" in text else path or "it"
    for theirs in sorted(_WORDS, key=len, reverse=True):
        fault = fault.replace(theirs, _WORDS[theirs])
    expected = fault.removeprefix("Expected ")
    return f"{where}: {fault.lower()}" if fault == expected else f"{where} must be {expected}"
