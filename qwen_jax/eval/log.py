"""Log of results in a JSONL file, so that a run can be resumed."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from qwen_jax.config import ConfigError
from qwen_jax.engine.request import Sparseness
from qwen_jax.eval.score import Result
from qwen_jax.eval.tasks import Cell
from qwen_jax.files import reading, schema
from qwen_jax.storage import atomic
from qwen_jax.storage.jsonl import Journal, changes

_OPENING = b'{"settings"'
_LOG_BYTES = 1 << 30


class _Settings(schema.Record, frozen=True):
    """The first line of a log."""

    settings: dict[str, Any]


class _Row(schema.Record, frozen=True, omit_defaults=True):
    """A result in a log."""

    task: str
    variant: str | None
    length: Annotated[int, Meta(ge=1, le=1 << 40)]
    depth: schema.Share | None
    sample: Annotated[int, Meta(ge=0, le=1 << 40)]
    expected: Annotated[tuple[str, ...], Meta(min_length=1)]
    answer: str
    score: schema.Share
    sparse: Sparseness | None = None


class LogError(ConfigError):
    """Error of a log that cannot be resumed; names the file and the remedy."""


class Log:
    """Log file, whose first line holds the settings, and each other line a result.

    A run that was killed can be resumed: cells in the file are not computed again,
    and a partial last line is dropped.

    Attributes:
        results: results in the file, by variant and cell.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Opens or creates the file.

        Raises:
            LogError: if the file holds something else, or results of other settings.
            JournalError: if another run is writing it, or the disk is full.
        """
        self.path = path
        self.results: dict[tuple[str | None, Cell], Result] = {}
        atomic.prepare(path, LogError)
        there = os.path.lexists(path)
        data = reading.read_bytes(path, limit=_LOG_BYTES, error=LogError) if there else b""
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if data and not whole and not data.startswith(_OPENING[: len(data)]):
            raise LogError(f"{path} is not a file of results: name another one")
        for number, line in enumerate(lines, 1):
            try:
                record = reading.parse_json(line)
                found = schema.read(record, _Settings if number == 1 else _Row)
            except ValueError as error:
                raise LogError(
                    f"{path}, line {number}: {error}: it is not a file of results, name another one"
                ) from None
            if isinstance(found, _Settings):
                self._check(found.settings, settings)
            else:
                self._remember(_result(found))
        with Journal(path) as journal:
            journal.repair()
            if not lines:
                journal.append({"settings": dict(settings)})

    def add(self, result: Result) -> None:
        """Appends a result; it is on disk when this returns."""
        self._remember(result)
        with Journal(self.path) as journal:
            journal.append(msgspec.to_builtins(_row(result)))

    def _remember(self, result: Result) -> None:
        self.results[result.variant, result.cell] = result

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differ = changes(before, now)
        if differ:
            raise LogError(
                f"{self.path} holds results of other settings ({differ}): name another file"
            )


def _row(result: Result) -> _Row:
    cell = result.cell
    return _Row(
        task=cell.task,
        variant=result.variant,
        length=cell.length,
        depth=cell.depth,
        sample=cell.sample,
        expected=result.expected,
        answer=result.answer,
        score=result.score,
        sparse=result.sparse,
    )


def _result(row: _Row) -> Result:
    return Result(
        cell=Cell(length=row.length, task=row.task, depth=row.depth, sample=row.sample),
        variant=row.variant,
        expected=row.expected,
        answer=row.answer,
        sparse=row.sparse,
    )
