"""Reading of untrusted files and JSON, within limits; errors are one line."""

import json
import math
import os
import re
import select
import stat
import sys
import time
from pathlib import Path
from typing import Any

JSON_BYTES = 64 << 20
"""Maximum size of a JSON file in bytes; the largest published tokenizer.json has 33 MB."""
JSON_DEPTH = 100
"""Maximum nesting of lists and objects."""
PIPE_SECONDS = 10.0
"""Seconds to wait for a pipe's writer."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class FileError(ValueError):
    """Error of a file that cannot be used; names it and the remedy."""


class RepeatedKey(ValueError):
    """Error of a JSON object that has a key twice.

    Attributes:
        key: the first such key.
    """

    def __init__(self, key: str):
        super().__init__(f"{printable(key, 60)!r} is given twice in one object")
        self.key = key


def printable(text: object, limit: int = 200) -> str:
    """Escapes foreign text for one line of a terminal or a log.

    Control characters, newlines and bidirectional controls are written as escapes, so that no
    text from a file, a name or a peer moves the cursor or ends the line.

    Args:
        limit: characters after which it is cut, with an ellipsis.
    """
    text = str(text)
    cut = text[: limit + 1]
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in cut
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def shown(path: object) -> str:
    """Escapes a path for an error, without cutting it."""
    return printable(path, limit=8192)


def read_bytes(
    path: Path | str,
    *,
    limit: int,
    error: type[ValueError] = FileError,
    pipes: bool = False,
) -> bytes:
    """Reads a regular file.

    Never blocks: pipes, sockets and devices are refused by their kind before they are read, and
    files over the limit before memory is allocated. A pipe that may be read is read as long as
    it has a writer, which must come within `PIPE_SECONDS`.

    Args:
        limit: maximum size in bytes.
        error: exception type raised instead of `FileError`.
        pipes: also read a pipe, such as a shell's `<(command)`, to its end.

    Raises:
        FileError: if it is missing, no regular file, too large or unreadable.
    """
    name = shown(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            piped = pipes and stat.S_ISFIFO(status.st_mode)
            if not (stat.S_ISREG(status.st_mode) or piped):
                raise error(f"{name} is {kind_of(status.st_mode)}, not a regular file")
            if status.st_size > limit:
                raise error(f"{name} has {status.st_size:,} bytes, more than the {limit:,} allowed")
            begun = _begin_pipe(descriptor) if piped else b""
            if begun is None:
                raise error(f"{name} is a pipe into which nobody writes")
            data = bytearray(begun)
            while part := os.read(descriptor, min(1 << 24, limit + 1 - len(data))):
                data += part
                if len(data) > limit:
                    raise error(f"{name} has more than the {limit:,} bytes allowed")
        finally:
            os.close(descriptor)
        return bytes(data)
    except FileNotFoundError:
        raise error(f"{name} is missing") from None
    except (OSError, ValueError) as found:  # a path with a zero byte is a ValueError
        if isinstance(found, error):
            raise
        raise error(f"{name} cannot be read: {reason(found)}") from None


def read_text(
    path: Path | str,
    *,
    limit: int,
    error: type[ValueError] = FileError,
    pipes: bool = False,
) -> str:
    """Reads a regular UTF-8 file; see `read_bytes`.

    Raises:
        FileError: also if it is not UTF-8.
    """
    data = read_bytes(path, limit=limit, error=error, pipes=pipes)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as found:
        raise error(f"{shown(path)} is not UTF-8 (byte {found.start})") from None


def read_json(
    path: Path | str, *, limit: int = JSON_BYTES, error: type[ValueError] = FileError
) -> Any:
    """Reads a JSON file by `parse_json`; see `read_bytes`.

    Raises:
        FileError: also if it is not valid JSON.
    """
    data = read_bytes(path, limit=limit, error=error)
    try:
        return parse_json(data)
    except ValueError as found:
        raise error(f"{shown(path)} is not valid JSON: {found}") from None


def read_object(
    path: Path | str, *, limit: int = JSON_BYTES, error: type[ValueError] = FileError
) -> dict[str, Any]:
    """Reads a JSON file that holds an object; see `read_json`.

    Raises:
        FileError: also if it holds another kind of value.
    """
    value = read_json(path, limit=limit, error=error)
    if not isinstance(value, dict):
        raise error(f"{shown(path)} must hold a JSON object, got {json_kind(value)}")
    return value


def parse_json(data: bytes | str) -> Any:
    """Parses JSON as strictly as RFC 8259 allows, in linear time.

    Refuses repeated keys, NaN and infinities (also numbers too large for a float64), integers of
    more digits than Python converts (4,300, unless PYTHONINTMAXSTRDIGITS says another number), lone
    surrogates, more than `JSON_DEPTH` levels and bytes that are not UTF-8.

    Raises:
        RepeatedKey: if an object has a key twice.
        ValueError: if it is invalid, with a reason of one line.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_constant=_no_number,
            parse_float=_finite,
        )
    except UnicodeDecodeError as found:
        raise ValueError(f"byte {found.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"it is nested over {JSON_DEPTH} levels deep") from None
    except ValueError as found:
        if type(found) is ValueError and "integer string conversion" in str(found):
            most = sys.get_int_max_str_digits()
            raise ValueError(f"a number of over {most:,} digits") from None
        raise
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(JSON_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, (dict, list))
        ]
    if level:
        raise ValueError(f"it is nested over {JSON_DEPTH} levels deep")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it holds a lone surrogate, which is no Unicode") from None
    return value


def json_kind(value: Any) -> str:
    """Names the kind of a JSON value, such as "an object"."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


def reason(error: BaseException) -> str:
    """Returns in one line why a file could not be used, in the operating system's words."""
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror)
    return printable(error)


def _begin_pipe(pipe: int) -> bytes | None:
    """Waits for a pipe's writer; returns its first bytes, None after `PIPE_SECONDS` without one."""
    until = time.monotonic() + PIPE_SECONDS
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    while time.monotonic() < until:
        ready = poll.poll(20)
        try:
            part = os.read(pipe, 1 << 16)
        except BlockingIOError:  # somebody writes, but nothing yet
            ready, part = True, b""
        if ready or part:
            os.set_blocking(pipe, True)
            return part
    return None


def kind_of(mode: int) -> str:
    """Names the kind of a file with this mode, such as "a directory"."""
    kinds = {
        stat.S_IFREG: "a regular file",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise RepeatedKey(twice)
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{printable(digits, 30)} is too large a number")
    return value
