"""Lines of a batch file, parsed into requests or errors."""

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
"""URLs that a line may request."""

MAX_LINE_BYTES = 64 << 20
"""Maximum length of a line in bytes: a million tokens of text are about 5 MB."""
MOST_LINE_BYTES = 1 << 30
"""Maximum length of a line that is skipped with an error; a file with a longer one is refused."""

_FIELDS = ("custom_id", "method", "url", "body")


class BatchError(ConfigError):
    """Error of a batch file that cannot be run; names the file, the lines and the remedy."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a batch file.

    Attributes:
        number: line number, from 1.
        custom_id: its `custom_id`; None if it has none that can be used.
        id: hash of its `custom_id` (its number, if it has none) and its content.
        url: requested URL, one of `URLS`.
        body: body of the request.
        error: reason why it is refused; `url` and `body` are then meaningless.
    """

    number: int
    custom_id: str | None
    id: str
    url: str = ""
    body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: APIError | None = None


class Input:
    """A batch file, which is read more than once and must not change meanwhile.

    Attributes:
        path: path of the file.
    """

    def __init__(self, path: Path):
        """Records size and time of the file, to notice changes.

        Raises:
            BatchError: if it is no regular file.
            OSError: if it does not exist.
        """
        self.path = path
        if not stat.S_ISREG(path.stat().st_mode):
            raise BatchError(f"{path} is not a regular file: it is read twice, so save it as one")
        self._state = _state(path.stat())

    def lines(self) -> Iterator[Line]:
        """Yields the lines that are not blank.

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
        """Skips the rest of an over-long line; returns the line with an error.

        Raises:
            BatchError: if it does not end within `MOST_LINE_BYTES`.
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
    """Parses a line from its bytes."""
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
    """Parses the JSON of a line; also returns it in a canonical form.

    Raises:
        APIError: if it is not valid JSON in UTF-8.
    """
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
    """Checks `custom_id`, `method` and `url` of a line; returns its URL and body.

    Raises:
        APIError: naming the field at fault.
    """
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
