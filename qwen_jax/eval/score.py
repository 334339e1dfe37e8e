"""Run the cells of a task through an engine, greedily, and keep one JSON line for each."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.config import ConfigError
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.request import Request
from qwen_jax.eval.tasks import Cell, Task
from qwen_jax.tokenizer import Tokenizer

_OPENING = b'{"settings"'

MAX_NEW_TOKENS = 24
"""Longest answer, in tokens; a right one repeats five digits in a sentence."""


class ScoreError(ConfigError):
    """Results that cannot be continued; the text names the file and the way out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a model answered in a cell."""

    cell: Cell
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Whether the answer contains the expected text."""
        return self.expected in self.answer


def run(
    engine: Engine,
    tokenizer: Tokenizer,
    cells: Iterable[Cell],
    build: Callable[[Cell], Task],
    *,
    eos_ids: tuple[int, ...],
) -> Iterator[Result]:
    """The result of each cell, one cell at a time.

    Raises:
        RequestError: if a prompt does not fit the engine.
    """
    for cell in cells:
        task = build(cell)
        request = Request(prompt=task.prompt, max_new_tokens=MAX_NEW_TOKENS, eos_ids=eos_ids)
        [ids] = engine.run([request])
        yield Result(cell=cell, expected=task.expected, answer=tokenizer.decode(ids))


class Log:
    """Results in a file, one JSON object a line; the first line holds the settings.

    A run that was killed is continued: cells in the file are not computed again,
    and half a line at its end is dropped.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Open or create the file.

        Raises:
            ScoreError: if the file holds something else, or results of other settings.
        """
        self.path = path
        self.results: dict[Cell, Result] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if data and not whole and not data.startswith(_OPENING[: len(data)]):
            raise ScoreError(f"{path} is not a file of results: name another one")
        try:
            if lines:
                self._check(json.loads(lines[0])["settings"], settings)
            for line in lines[1:]:
                self._remember(_result(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ScoreError):
                raise
            raise ScoreError(f"{path} is not a file of results: {error}") from None
        with path.open("r+b" if path.exists() else "xb") as file:
            file.truncate(len(whole))
        if not lines:
            self._append({"settings": dict(settings)})

    def add(self, result: Result) -> None:
        """Keep a result; it is on disk when this returns."""
        self._remember(result)
        self._append(
            dataclasses.asdict(result.cell)
            | {"expected": result.expected, "answer": result.answer, "correct": result.correct}
        )

    def _remember(self, result: Result) -> None:
        self.results[result.cell] = result

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differ:
            changes = ", ".join(
                f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in differ
            )
            raise ScoreError(
                f"{self.path} holds results of other settings ({changes}): name another file"
            )

    def _append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _result(record: Mapping[str, Any]) -> Result:
    return Result(
        cell=Cell(length=record["length"], depth=record["depth"], sample=record["sample"]),
        expected=record["expected"],
        answer=record["answer"],
    )


def accuracy(results: Iterable[Result]) -> dict[tuple[int, float], tuple[int, int]]:
    """Right answers and questions asked, for each length and depth."""
    table: dict[tuple[int, float], tuple[int, int]] = {}
    for result in results:
        at = result.cell.length, result.cell.depth
        right, asked = table.get(at, (0, 0))
        table[at] = right + result.correct, asked + 1
    return table
