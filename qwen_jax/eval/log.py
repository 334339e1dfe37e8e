"""Log of results in a JSONL file, so that a run can be resumed."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax.config import ConfigError
from qwen_jax.engine.request import Sparseness
from qwen_jax.eval.score import Result
from qwen_jax.eval.tasks import Cell
from qwen_jax.files import reading, schema
from qwen_jax.storage import atomic
from qwen_jax.storage.jsonl import Journal, changes

_OPENING = b'{"settings"'
_LOG_BYTES = 1 << 30
_SETTINGS = schema.fields(settings=schema.values(schema.anything))
_SHARE = schema.number(0, 1)
_RESULT = schema.fields(
    task=schema.text,
    variant=schema.maybe(schema.text),
    length=schema.whole(1, 1 << 40),
    depth=schema.maybe(_SHARE),
    sample=schema.whole(0, 1 << 40),
    expected=schema.items(schema.text, least=1),
    answer=schema.text,
    score=_SHARE,
    optional={
        "sparse": schema.fields(
            density=schema.number(0, 2),
            recall=schema.number(-1, 2),
            least_recall=schema.number(-1, 2),
            pairs=schema.whole(0, 1 << 60),
            tokens=schema.whole(0, 1 << 60),
        )
    },
)


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
                (_SETTINGS if number == 1 else _RESULT)("", record)
            except ValueError as error:
                raise LogError(
                    f"{path}, line {number}: {error}: it is not a file of results, name another one"
                ) from None
            if number == 1:
                self._check(record["settings"], settings)
            else:
                self._remember(_result(record))
        with Journal(path) as journal:
            journal.repair()
            if not lines:
                journal.append({"settings": dict(settings)})

    def add(self, result: Result) -> None:
        """Appends a result; it is on disk when this returns."""
        self._remember(result)
        with Journal(self.path) as journal:
            journal.append(_record(result))

    def _remember(self, result: Result) -> None:
        self.results[result.variant, result.cell] = result

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differ = changes(before, now)
        if differ:
            raise LogError(
                f"{self.path} holds results of other settings ({differ}): name another file"
            )


def _record(result: Result) -> dict[str, Any]:
    record = {
        "task": result.cell.task,
        "variant": result.variant,
        "length": result.cell.length,
        "depth": result.cell.depth,
        "sample": result.cell.sample,
        "expected": list(result.expected),
        "answer": result.answer,
        "score": result.score,
    }
    if result.sparse is not None:
        record["sparse"] = dataclasses.asdict(result.sparse)
    return record


def _result(record: Mapping[str, Any]) -> Result:
    sparse, depth = record.get("sparse"), record["depth"]
    if sparse is not None:
        shares = ("density", "recall", "least_recall")
        sparse = sparse | {name: float(sparse[name]) for name in shares}
    return Result(
        cell=Cell(
            length=record["length"],
            task=record["task"],
            depth=None if depth is None else float(depth),
            sample=record["sample"],
        ),
        variant=record["variant"],
        expected=tuple(record["expected"]),
        answer=record["answer"],
        sparse=Sparseness(**sparse) if sparse is not None else None,
    )
