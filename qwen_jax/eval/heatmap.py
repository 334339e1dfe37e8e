"""HeatMap: a table of values with labelled rows and columns; CSV output."""

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
    """Error of a picture that cannot be drawn; names the file and line, or flag, and the remedy."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Axis of a map, its rows or columns.

    Attributes:
        name: what the numbers are, such as a length or a layer.
        keys: numbers as in the source; None for a task that has no such number.
        labels: short labels of the numbers.
    """

    name: str
    keys: tuple[int | float | None, ...]
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeatMap:
    """A table of values, which are fractions.

    Attributes:
        what: name of the values.
        values: float array [rows, columns]; NaN where nothing was measured.
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
        across: maximum number of maps side by side.
    """

    title: str
    maps: tuple[HeatMap, ...]
    across: int


_CSV = re.compile(rb"map,(depth,tokens|layer,head),value\n")


def _is_ours(path: Path) -> bool:
    """Returns True if a file begins with the header that `write_csv` writes."""
    with path.open("rb") as file:
        return _CSV.match(file.read(64)) is not None


def check_csv(path: Path) -> None:
    """Checks, before long work, that `write_csv` can write a file.

    Raises:
        FileExistsError: if there is a file that `write_csv` did not write.
        FileError: if there is a directory of that name.
        OSError: if nothing can be written there.
    """
    atomic.prepare(path, streams=True)
    atomic.check_ours(path, _is_ours, streams=True)


def write_csv(panels: Panels, path: Path) -> None:
    """Writes one line per cell, map after map; values that were not measured are empty.

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
