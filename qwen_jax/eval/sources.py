"""Heat maps from files: scores from logs of `eval`, recall from reports of `calibrate`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from msgspec import Meta, Struct

from qwen_jax.eval.heatmap import Axis, HeatMap, Panels, PlotError
from qwen_jax.files import reading, schema
from qwen_jax.files.schema import named

_LOG_BYTES = 1 << 30
_Tokens = Annotated[str, named(r"[1-9]\d{0,11}", "tokens")]
_Tables = dict[_Tokens, list[list[Annotated[float, Meta(ge=-10, le=10)]]]]


class _File(Struct, frozen=True, kw_only=True):
    """The fields of a report of `calibrate` that are read."""

    format: Literal["qwen-jax calibration 1"]
    model: str
    recall: _Tables
    density: _Tables
    speedup: dict[_Tokens, Annotated[float, Meta(ge=0, le=1e6)]]


class _Head(Struct, frozen=True):
    """The first line of a log of `eval`."""

    settings: dict[str, Any]


class _Line(Struct, frozen=True, kw_only=True):
    """The fields of a line of a log of `eval` that are read."""

    length: Annotated[int, Meta(ge=1, lt=1 << 40)]
    depth: schema.Share | None = None
    score: schema.Share | None = None
    correct: bool | schema.Share | None = None
    task: str | None = None
    variant: str | None = None


class _Answer(NamedTuple):
    panel: tuple[str, str, str]  # file, task, variant
    length: int
    depth: float | None
    score: float


def scores(paths: Sequence[Path]) -> Panels:
    """Reads mean scores by depth and length, one map for each file, task and variant.

    A log is JSON lines: `{"settings": {...}}`, then a record for each answer with `length`,
    `depth` (none or null for a task without depths), `correct`, and perhaps `task`, `variant`
    and `score` (0 to 1, in place of `correct`). A partial last line is ignored. Maps of
    one task share their axes, so that missing cells are visible.

    Raises:
        PlotError: if a file cannot be read, is no such log, or holds no answers.
    """
    answers: list[_Answer] = []
    models: list[str] = []
    paths = list(dict.fromkeys(paths))
    for path in paths:
        settings, found = _read_log(path)
        if not found:
            raise PlotError(f"{path} holds no answers yet")
        answers += found
        models.append(Path(str(settings.get("model", ""))).name)
    panels = list(dict.fromkeys(answer.panel for answer in answers))
    tasks = list(dict.fromkeys(task for _, task, _ in panels))
    maps = []
    for panel in sorted(panels, key=lambda panel: tasks.index(panel[1])):
        same_task = [answer for answer in answers if answer.panel[1] == panel[1]]
        maps.append(_mean_scores(panel, same_task, named=len(paths) > 1))
    # A line for each task, if any has more than one map.
    most = max(sum(panel[1] == task for panel in panels) for task in tasks)
    known = ", ".join(dict.fromkeys(model for model in models if model))
    return Panels(
        title=f"{known}: mean score" if known else "mean score",
        maps=tuple(maps),
        across=min(3, len(maps) if most == 1 else most),
    )


def _mean_scores(
    panel: tuple[str, str, str],
    same_task: Sequence[_Answer],
    *,
    named: bool,
) -> HeatMap:
    lengths = sorted({answer.length for answer in same_task})
    depths: list[float | None] = []
    depths += sorted({answer.depth for answer in same_task if answer.depth is not None})
    if any(answer.depth is None for answer in same_task):
        depths.append(None)
    total = np.zeros((len(depths), len(lengths)))
    count = np.zeros(total.shape, int)
    for answer in same_task:
        if answer.panel == panel:
            at = depths.index(answer.depth), lengths.index(answer.length)
            total[at] += answer.score
            count[at] += 1
    path, task, variant = panel
    fewest, most = int(count[count > 0].min()), int(count.max())
    cells = f"{most}" if fewest == most else f"{fewest} to {most}"
    title = f"{task}, {variant} ({cells} answer{'s' * (most > 1)} a cell)"
    return HeatMap(
        title=f"{Path(path).name}: {title}" if named else title,
        what="mean score",
        values=np.where(count, total / np.maximum(count, 1), np.nan),
        rows=Axis(
            name="depth",
            keys=tuple(depths),
            labels=tuple("any" if depth is None else f"{100 * depth:.3g}%" for depth in depths),
        ),
        columns=Axis(name="tokens", keys=tuple(lengths), labels=_sizes(lengths)),
    )


def _read_log(path: Path) -> tuple[dict[str, Any], list[_Answer]]:
    data = reading.read_bytes(path, limit=_LOG_BYTES, error=PlotError)
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    settings: dict[str, Any] | None = None
    answers = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = reading.parse_json(line)
            if settings is None:
                settings = schema.read(record, _Head).settings
            else:
                answers.append(_answer(path, settings, record))
        except ValueError as error:
            raise PlotError(f"{path}, line {number}: {error}: no log of `qwen-jax eval`") from None
    if settings is None:
        raise PlotError(f"{path} is empty: no log of `qwen-jax eval`")
    return settings, answers


def _answer(path: Path, settings: dict[str, Any], record: dict[str, Any]) -> _Answer:
    line = schema.read(record, _Line)
    score = line.correct if line.score is None else line.score
    if score is None:
        raise ValueError("correct is missing")
    by_default = "dca" if settings.get("dca") else "rope"
    task = line.task or settings.get("task") or "answers"
    variant = line.variant or settings.get("variant") or by_default
    return _Answer((str(path), str(task), str(variant)), line.length, line.depth, float(score))


def _sizes(lengths: Sequence[int]) -> tuple[str, ...]:
    """Formats lengths as flags take them: 12k for thousands or 12K for 1,024s, if all are such."""
    for unit, letters in ((1024, "KM"), (1000, "km")):
        if all(length % unit == 0 for length in lengths):
            return tuple(
                f"{length // unit**2}{letters[1]}"
                if length % unit**2 == 0
                else f"{length // unit}{letters[0]}"
                for length in lengths
            )
    return tuple(f"{length:,}" for length in lengths)


def recall(path: Path, length: int | None = None) -> Panels:
    """Reads attention recall and density by layer and query head from a report of `calibrate`.

    Args:
        path: the report, a JSON object.
        length: prompt length in tokens, one of those in the report; the longest if None.

    Raises:
        PlotError: if the file cannot be read, is no such report, or lacks the length.
    """
    report = _read_report(path, length)
    found, kept = report.recall, report.density
    layer, head = np.unravel_index(np.argmin(found), found.shape)
    least = float(found[layer, head])
    title = f"{report.model}: sparse prefill of {report.length:,} tokens"
    if report.speedup is not None:
        title += f", predicted speed-up {report.speedup:.2f}"
    rows, columns = _numbered("layer", found.shape[0]), _numbered("head", found.shape[1])
    return Panels(
        title=title,
        across=2,
        maps=(
            HeatMap(
                title=f"attention recall: mean {found.mean():.3f}, "
                f"least {least:.3f} (layer {layer}, head {head})",
                what="recall",
                values=found,
                rows=rows,
                columns=columns,
                low=min(0.9, math.floor(least * 10) / 10),
            ),
            HeatMap(
                title=f"kept density: mean {kept.mean():.3f}",
                what="density",
                values=kept,
                rows=rows,
                columns=columns,
                high=max(0.1, math.ceil(float(kept.max()) * 10) / 10),
            ),
        ),
    )


class _Report(NamedTuple):
    model: str
    length: int
    recall: Float[np.ndarray, "L N"]
    density: Float[np.ndarray, "L N"]
    speedup: float | None


def _read_report(path: Path, length: int | None) -> _Report:
    try:
        report = schema.read(reading.read_object(path), _File)
        known = sorted(map(int, report.recall))
        if not known:
            raise ValueError("recall has no lengths")
        chosen = max(known) if length is None else length
        if chosen not in known:
            lengths = ", ".join(map(str, known))
            raise PlotError(f"{path} holds no length {chosen}: choose --length from {lengths}")
        found = _table(report.recall, chosen, "recall")
        kept = _table(report.density, chosen, "density")
        if found.shape != kept.shape:
            raise ValueError("recall and density are not of the same layers and heads")
    except PlotError:
        raise
    except reading.FileError as error:
        raise PlotError(f"{error}: no report of `qwen-jax calibrate`") from None
    except ValueError as error:
        raise PlotError(f"{path}: {error}: no report of `qwen-jax calibrate`") from None
    name = Path(report.model).name
    return _Report(name, chosen, found, kept, report.speedup.get(str(chosen)))


def _table(
    tables: dict[str, list[list[float]]], length: int, name: str
) -> Float[np.ndarray, "L N"]:
    rows = tables.get(str(length), [])
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"{name} of {length} tokens is no table of layers and heads")
    return np.asarray(rows, float)


def _numbered(name: str, count: int) -> Axis:
    return Axis(name=name, keys=tuple(range(count)), labels=tuple(map(str, range(count))))
