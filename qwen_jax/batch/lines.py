"""The lines of a batch file: what each asks, or why it cannot be asked."""

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.batch.openai_schema import APIError, said
from qwen_jax.config import ConfigError
from qwen_jax.files.reading import RepeatedKey, json_kind, parse_json, printable, shown

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT, COMPLETIONS)
"""What a line may ask for."""

MAX_LINE_BYTES = 64 << 20
"""Longest line that is read: a million tokens of text are about 5 MB."""
MOST_LINE_BYTES = 1 << 30
"""Longest line that is passed over; a file with a longer one is no batch."""

_FIELDS = ("custom_id", "method", "url", "body")


class BatchError(ConfigError):
    """A batch file that cannot be run; the text names the file, the lines and the way out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a batch file.

    Attributes:
        number: its place in the file, from 1.
        custom_id: its name; None if it has none that can be used.
        id: made from its name (its number, if it has none) and all that it says.
        url: what it asks for, one of `URLS`.
        body: the request.
        error: why it cannot be asked; `url` and `body` are then of no use.
    """

    number: int
    custom_id: str | None
    id: str
    url: str = ""
    body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: APIError | None = None


class Input:
    """A batch file, which is read more than once and must stay as it is meanwhile.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path):
        """Look at the file.

        Raises:
            BatchError: if it is no regular file.
            OSError: if there is none.
        """
        self.path = path
        if not stat.S_ISREG(path.stat().st_mode):
            raise BatchError(f"{path} is not a regular file: it is read twice, so save it as one")
        self._state = _state(path.stat())

    def lines(self) -> Iterator[Line]:
        """The lines that are not blank, one at a time.

        Raises:
            BatchError: if the file was changed.
            OSError: if it cannot be read.
        """
        with self.path.open("rb") as file:
            self._check(file)
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw.removesuffix(b"\n")) > MAX_LINE_BYTES:
                    yield self._too_long(number, raw, file)
                    continue
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                raw = raw.strip()
                if raw:
                    yield parse(number, raw)
            self._check(file)

    def _too_long(self, number: int, raw: bytes, file) -> Line:
        """An over-long line, read to its end without being kept.

        Raises:
            BatchError: if it has no end within `MOST_LINE_BYTES`.
        """
        digest, length = hashlib.sha256(b"%d " % number), 0
        while raw:
            digest.update(raw)
            length += len(raw.removesuffix(b"\n"))
            if length > MOST_LINE_BYTES:
                raise BatchError(
                    f"{shown(self.path)}: line {number} has more than {MOST_LINE_BYTES:,} bytes: "
                    "this is no file of batch lines"
                )
            if raw.endswith(b"\n"):
                break
            raw = file.readline(MAX_LINE_BYTES)
        return Line(
            number=number,
            custom_id=None,
            id=f"batch_req_{digest.hexdigest()[:32]}",
            error=APIError(
                f"the line has {length:,} bytes, lines may have {MAX_LINE_BYTES:,}",
                code="line_too_long",
            ),
        )

    def _check(self, file) -> None:
        if _state(os.fstat(file.fileno())) != self._state:
            raise BatchError(f"{self.path} changed while it was read: start again")


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def parse(number: int, raw: bytes) -> Line:
    """A line from its bytes."""
    custom_id, content, url, body, error = None, raw, "", {}, None
    try:
        value, content = _decode(raw)
        name = value.get("custom_id") if isinstance(value, dict) else None
        custom_id = name if isinstance(name, str) and name else None
        url, body = _checked(value)
    except APIError as fault:
        error = fault
    name = json.dumps(custom_id or number)
    digest = hashlib.sha256(name.encode() + b" " + content).hexdigest()
    return Line(
        number=number,
        custom_id=custom_id,
        id=f"batch_req_{digest[:32]}",
        url=url,
        body=body,
        error=error,
    )


def _decode(raw: bytes) -> tuple[Any, bytes]:
    """What a line says, and the same however it is spelled."""
    param = None
    try:
        value = parse_json(raw.decode("utf-8"))
        return value, json.dumps(value, sort_keys=True).encode()
    except UnicodeDecodeError as error:
        fault = f"the line is not UTF-8 (byte {error.start})"
    except RepeatedKey as error:
        fault, param = str(error), printable(error.key)
    except ValueError as error:
        fault = f"the line is not valid JSON: {error}"
    raise APIError(fault, code="invalid_json", param=param)


def _checked(value: Any) -> tuple[str, Mapping[str, Any]]:
    """Url and body of a line that names itself, its method and its url rightly."""
    if not isinstance(value, dict):
        raise APIError(f"the line is {json_kind(value)}, not an object", code="invalid_json")
    name = value.get("custom_id")
    if not isinstance(name, str) or not name:
        raise APIError(
            "custom_id must be a text that is not empty: the answer is found by it",
            param="custom_id",
        )
    unknown = value.keys() - set(_FIELDS)
    if unknown:
        name = printable(min(unknown))
        raise APIError(
            f"{name!r} is no field of a batch line, which has {', '.join(_FIELDS)}", param=name
        )
    if value.get("method") != "POST":
        raise APIError(f"method must be 'POST', got {said(value.get('method'))}", param="method")
    url, body = value.get("url"), value.get("body")
    if url not in URLS:
        raise APIError(
            f"url must be {' or '.join(map(repr, URLS))}, got {said(url)}",
            code="invalid_url",
            param="url",
        )
    if not isinstance(body, dict):
        raise APIError(f"body must be an object, got {json_kind(body)}", param="body")
    return url, body
