"""HeatMap: a table of shares with names for its rows and columns; as CSV."""

import csv
import dataclasses
import io
import math
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float

from qwen_jax.config import ConfigError
from qwen_jax.storage import atomic


class PlotError(ConfigError):
    """What cannot be drawn; the text names the file and line, or the flag, and the way out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What the rows or columns of a map stand for.

    Attributes:
        keys: numbers as in the source; None for a task that has no such number.
        labels: the same for people, short.
    """

    name: str
    keys: tuple[int | float | None, ...]
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeatMap:
    """A table of shares.

    Attributes:
        what: name of the values.
        values: NaN where nothing was measured.
        low: value of the first colour.
        high: value of the last colour.
    """

    title: str
    what: str
    values: Float[np.ndarray, "rows columns"]
    rows: Axis
    columns: Axis
    low: float = 0.0
    high: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Panels:
    """Heat maps that belong together.

    Attributes:
        across: maps side by side, where there is room.
    """

    title: str
    maps: tuple[HeatMap, ...]
    across: int


_CSV = re.compile(rb"map,(depth,tokens|layer,head),value\n")


def _is_ours(path: Path) -> bool:
    """Whether a file begins as `write_csv` does."""
    with path.open("rb") as file:
        return _CSV.match(file.read(64)) is not None


def check_csv(path: Path) -> None:
    """Refuses what `write_csv` could not write.

    Raises:
        FileExistsError: if there is a file that does not begin with the names of our columns.
        FileError: if there is a directory of that name.
        OSError: if nothing can be written there.
    """
    atomic.prepare(path, streams=True)
    atomic.check_ours(path, _is_ours, streams=True)


def write_csv(panels: Panels, path: Path) -> None:
    """One line a cell, map after map; the value of a cell that was not measured is empty.

    Raises:
        FileExistsError, FileError: see `check_csv`.
        OSError: if it cannot be written.
    """
    check_csv(path)
    first = panels.maps[0]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["map", first.rows.name, first.columns.name, "value"])
    for shown in panels.maps:
        for row, key in enumerate(shown.rows.keys):
            for column, other in enumerate(shown.columns.keys):
                value = float(shown.values[row, column])
                cell = "" if math.isnan(value) else value
                writer.writerow([shown.title, "" if key is None else key, other, cell])
    atomic.write(path, file.getvalue(), streams=True)
