"""Calibration of sparse prefill: search for budgets over surveys of texts, checkpoints, report.

Every head gets the pair of budgets that maximises `rate * recall - density`, with one rate
for all heads: the lowest at which the mean recall meets the target at each length.
So concentrated attention is read nearly whole, and attention that is spread over
all keys costs no more than it is worth (arXiv:2501.15383, section 5, grows budgets by fixed
increments instead).
"""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from qwen_jax.config import ConfigError, ModelConfig
from qwen_jax.sparse.recall import Grid, Survey
from qwen_jax.storage import atomic

_VERTICAL = (64, 130, 250, 500, 1000, 2000, 3500, 5548, 8192, 12288, 16384, 22032)
_SLASH = (100, 200, 400, 800, 1600, 3200, 6096, 8144, 10192, 14288, 18340, 24528)


REPORT_FORMAT = "qwen-jax calibration 1"


class CalibrationError(ConfigError):
    """Error of budgets that cannot be found or stored; names the value and the remedy."""


def budgets_up_to(longest: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the column and diagonal budgets to survey for texts of up to `longest` tokens."""

    def some(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size for size in sizes if size < longest) or sizes[:1]

    return some(_VERTICAL), some(_SLASH)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """Recall and density of every pair of budgets on one text, over slices of its second half.

    Earlier slices are left out, because in them every budget covers nearly all keys.

    Attributes:
        recall: fraction of attention on the selected keys, averaged over slices.
        density: computed pairs of query and key as a fraction of those of dense prefill.
        overall: density over the whole text.
    """

    recall: Float[np.ndarray, "L N V S"]
    density: Float[np.ndarray, "L N V S"]
    overall: Float[np.ndarray, "L N V S"]


def sample(surveys: Iterable[tuple[int, int, Survey]], length: int) -> Sample:
    """Aggregates the surveys of a text's slices (`Engine.survey`).

    Args:
        surveys: start, length and survey of each slice, in order.
        length: length of the text in tokens.
    """
    late, recalls, kept, dense = [], [], [], []
    for start, count, survey in surveys:
        late.append(2 * (start + count) > length)
        recalls.append(survey.recall())
        dense.append(np.asarray(survey.dense, np.float64)[..., None, None])
        kept.append(survey.density() * dense[-1])
    later = slice(late.index(True), None)
    return Sample(
        recall=np.mean(recalls[later], 0),
        density=np.sum(kept[later], 0) / np.sum(dense[later], 0),
        overall=np.sum(kept, 0) / np.sum(dense, 0),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Budgets:
    """Budgets chosen for each head, with their recall and density at each length.

    Attributes:
        vertical: number of key columns.
        slash: number of diagonals.
        recall: recall on the second halves of texts, by length in tokens.
        density: density of whole texts, by length in tokens.
    """

    vertical: Int[np.ndarray, "L N"]
    slash: Int[np.ndarray, "L N"]
    recall: Mapping[int, Float[np.ndarray, "L N"]]
    density: Mapping[int, Float[np.ndarray, "L N"]]


def search(
    samples: Mapping[int, Sequence[Sample]],
    grid: Grid,
    target_recall: float,
    margin: float = 0.0,
) -> Budgets:
    """Finds the cheapest budgets whose recall meets the target at every length.

    Args:
        samples: samples by length in tokens.
        grid: budgets that the samples cover.
        target_recall: minimum of the mean recall over layers and heads.
        margin: recall above the target to aim for on these samples, as far as the largest
            budgets reach, since other texts show less.

    Raises:
        CalibrationError: if the largest budgets do not meet the target.
    """
    recall, density = (_means(samples, name) for name in ("recall", "density"))
    most = min(of_length[..., -1, -1].mean() for of_length in recall.values())
    if most < target_recall:
        raise CalibrationError(
            f"--target-recall {target_recall} is out of reach: the largest budgets "
            f"({grid.vertical[-1]} columns, {grid.slash[-1]} diagonals) find {most:.3f}"
        )
    aim = min(target_recall + margin, most)
    gain = np.mean(list(recall.values()), 0)
    cost = np.mean(list(density.values()), 0)

    def choose(rate: float):
        value = (rate * gain - cost).reshape(*gain.shape[:2], -1)
        return np.unravel_index(value.argmax(-1), gain.shape[2:])

    def meets(pair) -> bool:
        return all(_at(table, pair).mean() >= aim for table in recall.values())

    low, high = 0.0, 1.0
    while not meets(choose(high)) and high < 1e6:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if meets(choose(middle)) else (middle, high)
    pair = choose(high)
    if not meets(pair):  # what is missing would cost more than any rate
        pair = np.broadcast_to(np.subtract(gain.shape[2:], 1)[:, None, None], (2, *gain.shape[:2]))
    return Budgets(
        vertical=np.asarray(grid.vertical)[pair[0]],
        slash=np.asarray(grid.slash)[pair[1]],
        **_measured(samples, pair),
    )


def on_other_texts(
    budgets: Budgets, samples: Mapping[int, Sequence[Sample]], grid: Grid
) -> Budgets:
    """Returns the same budgets with recall and density measured on other texts."""
    pair = (
        np.searchsorted(grid.vertical, budgets.vertical),
        np.searchsorted(grid.slash, budgets.slash),
    )
    return dataclasses.replace(budgets, **_measured(samples, pair))


def _measured(samples: Mapping[int, Sequence[Sample]], pair) -> dict[str, Any]:
    return {
        name: {length: _at(table, pair) for length, table in _means(samples, field).items()}
        for name, field in (("recall", "recall"), ("density", "overall"))
    }


def _means(samples: Mapping[int, Sequence[Sample]], field: str) -> dict[int, np.ndarray]:
    return {
        length: np.mean([getattr(each, field) for each in found], 0)
        for length, found in samples.items()
    }


def _at(table: np.ndarray, pair) -> np.ndarray:
    layer, head = np.indices(table.shape[:2])
    return table[layer, head, *pair]


def file_content(budgets: Budgets) -> list[dict[str, list[Any]]]:
    """Builds the content of `sparse_attention_config.json`.

    Scores are the recall at the longest length.
    """
    score = budgets.recall[max(budgets.recall)]
    return [
        {
            str(head): [
                "vertical_and_slash",
                int(budgets.vertical[layer, head]),
                int(budgets.slash[layer, head]),
                round(float(score[layer, head]), 4),
            ]
            for head in range(score.shape[1])
        }
        for layer in range(score.shape[0])
    ]


def report(
    budgets: Budgets,
    grid: Grid,
    config: ModelConfig,
    *,
    model: str,
    target_recall: float,
    margin: float = 0.0,
) -> dict[str, Any]:
    """Builds the report as JSON: budgets, recall and density per head, predicted speed-up."""
    return {
        "format": REPORT_FORMAT,
        "model": model,
        "target_recall": target_recall,
        "margin": margin,
        "last_q": grid.last_q,
        "tiles": [grid.tiles.q, grid.tiles.k],
        "lengths": sorted(budgets.recall),
        "vertical": budgets.vertical.tolist(),
        "slash": budgets.slash.tolist(),
        "recall": {str(n): table.round(4).tolist() for n, table in budgets.recall.items()},
        "density": {str(n): table.round(4).tolist() for n, table in budgets.density.items()},
        "speedup": {
            str(n): round(predicted_speedup(config, n, float(table.mean())), 3)
            for n, table in budgets.density.items()
        },
    }


def predicted_speedup(config: ModelConfig, length: int, density: float) -> float:
    """Predicts the speed-up of sparse over dense prefill at a mean density, from FLOPs.

    Counts matrix products only; the vote, in which 1/64 of a slice's queries read the keys
    twice, is left out.
    """
    D, F, H = config.embed_dim, config.mlp_dim, config.head_dim
    linear = D * H * (2 * config.num_heads + 2 * config.num_kv_heads) + 3 * D * F
    attention = 2 * H * config.num_heads * length / 2  # of a mean token: two products
    return (linear + attention) / (linear + attention * density)


class Progress:
    """Samples in a directory, one file per text, so that a killed calibration can resume.

    Args:
        directory: created if missing; removed by `clear` once it is empty.
        settings: settings that the samples depend on; must be JSON.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        self.directory = directory
        text = json.dumps(settings, sort_keys=True)
        self._prefix = hashlib.sha256(text.encode()).hexdigest()[:16]
        directory.mkdir(parents=True, exist_ok=True)

    def load(self, name: str) -> Sample | None:
        """Loads a sample that was saved under these settings; None if there is none.

        Raises:
            CalibrationError: if its file is damaged.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            # Opened here, since `np.load` leaves open what it cannot read.
            with path.open("rb") as raw, np.load(raw) as file:
                found = {field: file[field] for field in file.files}
            kinds = {(array.dtype.kind, array.ndim, array.shape) for array in found.values()}
            if len(kinds) != 1 or next(iter(kinds))[:2] != ("f", 4):
                raise ValueError("its arrays are no tables of layers, heads and budgets")
            return Sample(**found)
        except (ValueError, OSError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise CalibrationError(f"{path} is damaged ({error}): delete it") from None

    def save(self, name: str, sample: Sample) -> None:
        """Saves a sample atomically; it is on disk when this returns."""
        content = io.BytesIO()
        np.savez(content, **{f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)})
        atomic.write(self._path(name), content.getvalue())

    def clear(self) -> None:
        """Deletes the samples of these settings, and the directory if it is then empty."""
        for path in self.directory.glob(f"{self._prefix}-*"):
            path.unlink()
        if not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _path(self, name: str) -> Path:
        return self.directory / f"{self._prefix}-{name}.npz"
