"""Results of a batch: records in OpenAI's format, in a file that a new run resumes."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from qwen_jax.batch.lines import BatchError, Line
from qwen_jax.batch.openai_schema import APIError
from qwen_jax.batch.reader import ParsedLine
from qwen_jax.files import reading, schema
from qwen_jax.files.reading import shown
from qwen_jax.files.schema import named
from qwen_jax.storage import jsonl
from qwen_jax.storage.jsonl import Journal, JournalError, changes

Record = dict[str, Any]

_FORMAT = "qwen-jax batch 1"


class _Meta(schema.Record, frozen=True):
    """The content of the file beside the output."""

    format: Literal["qwen-jax batch 1"]
    settings: dict[str, Any]


class _Response(schema.Record, frozen=True):
    """An answer or an error, as HTTP would have it."""

    status_code: Annotated[int, Meta(ge=100, le=599)]
    request_id: str
    body: dict[str, Any]


class _Line(schema.Record, frozen=True):
    """A record in the output."""

    id: Annotated[str, named("batch_req_[0-9a-f]{32}", "the id of a batch line")]
    custom_id: str | None
    response: _Response
    error: Any


def answered(
    asked: ParsedLine, text: str, *, finish: Literal["stop", "length"], new_tokens: int, model: str
) -> Record:
    """Builds the record of an answered line.

    Args:
        text: text of the answer.
        finish: reason why it ended.
        new_tokens: tokens of the answer, without the end token.
        model: name of the model.
    """
    prompt_tokens = len(asked.request.prompt)
    choice: Record = {"index": 0, "finish_reason": finish, "logprobs": None}
    if asked.is_chat:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["text"] = text
    kind, prefix = ("chat.completion", "chatcmpl") if asked.is_chat else ("text_completion", "cmpl")
    body = {
        "id": f"{prefix}-{_digest(asked.line)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
        },
    }
    return _record(asked.line, 200, body)


def failed(line: Line, error: APIError) -> Record:
    """Builds the record of a line that was refused or failed."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    body = {
        "error": {
            "message": f"line {line.number}: {error}",
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }
    return _record(line, error.status, body)


def _record(line: Line, status: int, body: Record) -> Record:
    return {
        "id": line.id,
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": f"req_{_digest(line)}", "body": body},
        "error": None,
    }


def _digest(line: Line) -> str:
    return line.id.removeprefix("batch_req_")


class Results:
    """Output file, one record for each line of the input, in order of completion.

    The settings that the records depend on are in `FILE.meta` beside it, which also marks the
    file as written by this program.

    Attributes:
        num_errors: number of records of refused or failed lines.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Opens or creates the file, cuts off a partial last line, and reads its records.

        Raises:
            JournalError: if another run has locked it, or it or `FILE.meta` holds something
                else, or results of other settings.
            OSError: if it cannot be opened.
        """
        meta = path.with_name(f"{path.name}.meta")
        self.num_errors = 0
        self._ids: dict[tuple[str, str], str] = {}
        before = _read_meta(path, meta)  # first: nothing is made beside what is not ours
        self._journal = Journal(path)
        try:
            if not self._journal.is_empty and before is None:
                raise JournalError(
                    f"{shown(path)} is not the output of a batch, {shown(meta)} is missing: name "
                    "another file"
                )
            self._journal.repair()
            if self._journal.is_empty:
                jsonl.write(meta, {"format": _FORMAT, "settings": dict(settings)})
            else:
                _check(path, before or {}, settings)
            self._read()
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_):
        self._journal.close()

    def __len__(self) -> int:
        return len(self._ids)

    def has(self, line: Line) -> bool:
        """Returns True if the file has the record of a line.

        Raises:
            BatchError: if it is the record of another line of the same `custom_id`.
        """
        name = _name(line.custom_id, line.id)
        if name not in self._ids:
            return False
        if self._ids[name] != line.id:
            raise BatchError(
                f"{shown(self._journal.path)} holds a result of custom_id {line.custom_id!r}, but "
                f"line {line.number} of the input asks something else than then: give it another "
                "custom_id or name another output"
            )
        return True

    def add(self, *records: Record) -> None:
        """Appends records; they are on disk when this returns.

        Raises:
            JournalError: if the disk is full or fails; none of them is stored then.
        """
        self._journal.append(*records)
        for record in records:
            self._remember(record)

    def _read(self) -> None:
        path = self._journal.path
        for number, line in enumerate(self._journal.lines(), start=1):
            try:
                record = reading.parse_json(line)
                schema.read(record, _Line)
                twice = _name(record["custom_id"], record["id"]) in self._ids
                self._remember(record)
            except ValueError as error:
                raise JournalError(
                    f"{shown(path)}: line {number} is not a result, {error}: repair it "
                    "or name another file"
                ) from None
            if twice:
                raise JournalError(
                    f"{shown(path)}: line {number} is a second result of custom_id "
                    f"{record['custom_id']!r}: remove one or name another file"
                )

    def _remember(self, record: Record) -> None:
        self.num_errors += record["response"]["status_code"] != 200
        self._ids[_name(record["custom_id"], record["id"])] = record["id"]


def _name(custom_id: str | None, number: str) -> tuple[str, str]:
    """Returns the key of a result: the `custom_id` of its line, or the line's id without one."""
    return ("id", number) if custom_id is None else ("custom_id", custom_id)


def _read_meta(path: Path, meta: Path) -> dict[str, Any] | None:
    """Reads the settings in the file beside an output; None if it does not exist.

    Raises:
        JournalError: if this program did not write it.
    """
    if not os.path.lexists(meta):
        return None
    try:
        found = reading.read_object(meta, error=JournalError)
        schema.read(found, _Meta)
    except schema.SchemaError as error:
        raise JournalError(
            f"{shown(meta)} does not belong to a batch, {error}: name another output than "
            f"{shown(path)}"
        ) from None
    except JournalError as error:
        raise JournalError(f"{error}: name another output than {shown(path)}") from None
    return found["settings"]


def _check(path: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    differ = changes(before, json.loads(json.dumps(settings)))
    if differ:
        raise JournalError(
            f"{shown(path)} holds results of other settings ({differ}): run with those or name "
            "another file"
        )
