"""Tile sizes: how many queries and keys a kernel handles at a time. Speed, not numerics.

`tuned/BACKEND.json`, made by `scripts/tune_kernels.py`, has a row per generation of devices:
the names that jax has for it, the dtype and size of heads if the row is for these alone, and for
each operation the keyword arguments of the backend's function that differ from its defaults,
`Tiles` as {"q": ..., "k": ...}. Prefill by a plan is an operation of its own, "sparse prefill".
What is in no row gets the defaults. The environment variable `PALLAS_KERNELS_TUNED` names a
directory of such files to use instead.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "PALLAS_KERNELS_TUNED"
PACKAGED = Path(__file__).parents[1] / "tuned"


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """Rows and columns of one block of scores.

    Attributes:
        q: rows per tile: query positions times the query heads that share a KV head.
        k: keys per tile.
    """

    q: int
    k: int


def split(total: int, most: int) -> tuple[int, int]:
    """Split `total` into equal tiles of at most `most`: their number and their size."""
    count = -(-total // most)
    return count, -(-total // count)


def of_page(page: int, most: int) -> int:
    """Return keys per tile: the largest divisor of the page up to `most`, or all of an odd page."""
    tile = max(d for d in range(1, min(page, most) + 1) if page % d == 0)
    return tile if tile >= min(page, 64) else page


def tuned(
    backend: str, operation: str, device_kind: str, dtype: str, head_dim: int
) -> dict[str, Any]:
    """Return tuned keyword arguments for an operation of a backend; {} for the defaults.

    Raises:
        ValueError: if the file cannot be used.
    """
    for row in _table(_path(backend)).values():
        of_these = row.get("dtype", dtype) == dtype and row.get("head_dim", head_dim) == head_dim
        if of_these and device_kind in row["device_kinds"]:
            found = row.get(operation, {})
            return {
                name: Tiles(**value) if isinstance(value, dict) else value
                for name, value in found.items()
            }
    return {}


def generations(backend: str) -> dict[str, str]:
    """Return the generations that a backend has tuned rows for, with a device kind of each."""
    return {name: row["device_kinds"][0] for name, row in _table(_path(backend)).items()}


def tables() -> Path:
    """Return the directory of the tables in use."""
    return Path(os.environ.get(VARIABLE) or PACKAGED)


def _path(backend: str) -> Path:
    return tables() / f"{backend}.json"


@functools.cache
def _table(path: Path) -> dict[str, dict[str, Any]]:
    if path.parent.is_dir() and not path.exists():
        return {}  # a backend without a table
    try:
        rows = json.loads(path.read_text())
        for name, row in rows.items():
            _check(name, row)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no table of tile sizes: {error!r}") from None
    return rows


def _check(name: str, row: dict[str, Any]) -> None:
    """Refuse a row of other kinds of values than the module's description says.

    Raises:
        ValueError: naming the field.
    """
    kinds = row["device_kinds"]
    if not isinstance(kinds, list) or not kinds or not all(isinstance(k, str) for k in kinds):
        raise ValueError(f"{name}.device_kinds must be a list of names")
    if not isinstance(row.get("dtype", ""), str) or not _is_size(row.get("head_dim", 1)):
        raise ValueError(f"{name}.dtype must be a name, and head_dim a size")
    for operation in row.keys() - {"device_kinds", "dtype", "head_dim"}:
        for field, value in row[operation].items():
            tiles = isinstance(value, dict) and value.keys() == {"q", "k"}
            if not (all(map(_is_size, value.values())) if tiles else _is_size(value)):
                raise ValueError(f"{name}.{operation}.{field} must be a size, or q and k")


def _is_size(value: Any) -> bool:
    return type(value) in (int, bool) and 0 <= value < 1 << 40
