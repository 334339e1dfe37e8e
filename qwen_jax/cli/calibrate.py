"""calibrate: budgets of sparse prefill for a checkpoint, from texts."""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer

from qwen_jax.cli import quantities
from qwen_jax.cli.flags import ModelArgument, ModelFlags, Reads, expand, note, option, spelled
from qwen_jax.cli.placement import one_device
from qwen_jax.cli.progress import LINE_S
from qwen_jax.config import ConfigError
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.layout import EngineConfig, EngineLayout
from qwen_jax.files import reading
from qwen_jax.llm import documents
from qwen_jax.llm.model import Model, open_model
from qwen_jax.llm.options import Within
from qwen_jax.models.configs import last_q
from qwen_jax.sparse import calibrate as calibration
from qwen_jax.sparse.budgets import tiles_on
from qwen_jax.sparse.recall import Grid
from qwen_jax.storage import atomic


@expand
def calibrate(
    model: ModelArgument,
    model_flags: ModelFlags,
    data: Annotated[
        list[Path],
        typer.Option(help="A text file or a directory; may be given repeatedly.", metavar="PATH"),
    ],
    out: Annotated[
        Path,
        typer.Option(help="The budgets, for --sparse-config or a Hugging Face directory."),
    ] = Path("sparse_attention_config.json"),
    lengths: Annotated[
        str,
        typer.Option(help="Text lengths in tokens; 1K is 1,024, 1M is 1,048,576, 1k is 1,000."),
        Reads(quantities.lengths),
    ] = "32K,128K",
    samples: Annotated[
        int, typer.Option(help="Texts of each length, spread over the data."), Within(1)
    ] = 1,
    target_recall: Annotated[
        float,
        typer.Option(help="Share of the attention that a mean head finds, at each length."),
        Within(over=0, most=1),
    ] = 0.9,
    margin: Annotated[
        float,
        typer.Option(help="Found in --data beyond the target: other texts show less."),
        Within(0, under=1),
    ] = 0.02,
    held_out: Annotated[
        list[Path] | None,
        option("Other text, to see what the budgets find in it; may be repeated.", metavar="PATH"),
    ] = None,
    report: Annotated[
        Path | None, option("All figures, for `plot recall`; beside --out.", metavar="FILE")
    ] = None,
):
    """Find budgets of sparse prefill for every head.

    Texts are prefilled densely; what each pair of budgets would have found of the
    attention, and computed for it, is measured on the way. Then every head gets
    the pair that finds most for what it costs, at the rate at which the target and
    a margin are met. A run that is stopped goes on where it was, text by text, when repeated.

    Examples:
        qwen-jax calibrate ckpt/7b-1m --data books/ --lengths 128K,512K
        qwen-jax ask ckpt/7b-1m --sparse-config sparse_attention_config.json --file book.txt "Who?"
    """
    mesh = one_device(model_flags.mesh, "texts are surveyed")
    opened = open_model(model, dataclasses.replace(model_flags, mesh=mesh))
    sizes = sorted(set(quantities.lengths(lengths)))
    opened.check_fits(sizes[-1])
    atomic.prepare(out)
    report = report or out.with_suffix(".report.json")
    atomic.prepare(report)
    if out == report:
        raise ConfigError(f"--out and --report are one file, {out}: give two")
    kept = out.with_suffix(".progress")
    if kept in (out, report):
        raise ConfigError(f"{kept} is where texts are kept on the way: name another file")
    check_ours(out, report)
    vertical, slash = calibration.budgets_up_to(sizes[-1])
    voters = last_q(opened.directory)
    tiles = tiles_on(jax.default_backend())
    grid = Grid(vertical=vertical, slash=slash, last_q=voters, tiles=tiles)
    survey = _Surveyor(opened, grid, sizes, samples, kept)
    texts = {"--data": survey.tokens("--data", data)}
    if held_out:
        texts["--held-out"] = survey.tokens("--held-out", held_out)
    budgets = calibration.search(survey.samples(texts["--data"]), grid, target_recall, margin)
    figures = calibration.report(
        budgets,
        grid,
        opened.config,
        model=opened.directory.name,
        target_recall=target_recall,
        margin=margin,
    )
    content = json.dumps(calibration.file_content(budgets)) + "\n"
    figures["budgets_sha256"] = hashlib.sha256(content.encode()).hexdigest()
    check_ours(out, report)
    if out.exists():  # so that these are known as ours until the others are in their place
        figures["replaced_budgets_sha256"] = _sha256(out)
    atomic.write(report, json.dumps(figures) + "\n")
    atomic.write(out, content)
    _print(budgets, figures["speedup"])
    if held_out:
        others = survey.samples(texts["--held-out"])
        elsewhere = calibration.on_other_texts(budgets, others, grid)
        print("held-out text:")
        _print(elsewhere)
        least = min(recall.mean() for recall in elsewhere.recall.values())
        if least < target_recall:
            note(
                f"held-out text falls short of --target-recall {target_recall}: "
                f"give more kinds of --data, or a --margin over {margin}"
            )
    survey.clear()
    note(f"wrote {out} and {report}")


class _Surveyor:
    """Measures samples of texts, stored until `clear`."""

    def __init__(self, opened: Model, grid: Grid, sizes: list[int], samples: int, kept: Path):
        self._opened, self._grid, self._sizes, self._samples = opened, grid, sizes, samples
        self._kept = kept
        self._slices = _slices(opened)
        self._engine = None
        self._progress: list[calibration.Progress] = []

    def tokens(self, flag: str, paths: list[Path]) -> tuple[int, ...]:
        """Reads and encodes files.

        Raises:
            ConfigError: if they are fewer than the longest text.
            DocumentError: if a named path holds no text.
        """
        found = documents.read(paths, skipped=note, spell=spelled)
        text = "\n\n".join(each.text for each in found)
        ids = tuple(self._opened.tokenizer().encode_prompt(text))
        if len(ids) < self._sizes[-1]:
            raise ConfigError(
                f"{flag} holds {len(ids):,} tokens, --lengths asks for {self._sizes[-1]:,}: "
                "give more text"
            )
        return ids

    def samples(self, ids: tuple[int, ...]) -> dict[int, list[calibration.Sample]]:
        """Returns samples by length, of texts spread evenly over the tokens."""
        progress = calibration.Progress(
            self._kept,
            {
                # Texts are prefilled densely, whatever the budgets.
                **dataclasses.replace(self._opened, sparse=None).settings(),
                "config": repr(self._opened.config),
                "dtype": self._opened.precision()[0],
                "kernels": self._opened.options.kernels or "auto",
                "data": hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest(),
                "grid": repr(self._grid),
                "slices": self._slices,
                "samples": self._samples,
            },
        )
        self._progress.append(progress)
        found: dict[int, list[calibration.Sample]] = {length: [] for length in self._sizes}
        for length in self._sizes:
            for number in range(self._samples):
                start = (len(ids) - length) * number // max(self._samples - 1, 1)
                label = f"text {number + 1} of {self._samples}, {length:,} tokens"
                name = f"{length}-{number}"
                sample = progress.load(name)
                if sample is None:
                    sample = self._survey(ids[start : start + length], label)
                    progress.save(name, sample)
                else:
                    note(f"{self._kept} holds {label}")
                found[length].append(sample)
        return found

    def clear(self) -> None:
        """Deletes the stored samples."""
        for progress in self._progress:
            progress.clear()

    def _survey(self, ids: tuple[int, ...], label: str) -> calibration.Sample:
        if self._engine is None:
            self._engine = self._opened.engine(self._sizes[-1], slices=self._slices)
        assert isinstance(self._engine, Engine)  # on one device
        surveys = self._engine.survey(ids, self._grid)
        return calibration.sample(_watched(surveys, len(ids), label), len(ids))


def _print(budgets: calibration.Budgets, speedup: dict[str, float] | None = None) -> None:
    for length, recall in sorted(budgets.recall.items()):
        density = budgets.density[length]
        predicted = f", predicted speed-up {speedup[str(length)]:.2f}" if speedup else ""
        print(
            f"{length:,} tokens: recall {recall.mean():.3f} ({recall.min():.3f} in the worst "
            f"head), {density.mean():.1%} of the attention computed{predicted}"
        )


def check_ours(out: Path, report: Path) -> None:
    """Refuses to replace files that no calibration wrote."""
    found = {}
    if os.path.lexists(report):
        with contextlib.suppress(ValueError):
            found = reading.read_object(report)
    ours = found.get("format") == calibration.REPORT_FORMAT
    atomic.check_ours(report, lambda _: ours)
    # Budgets are in a format that has no place for a mark: the report knows them.
    known = found.get("budgets_sha256"), found.get("replaced_budgets_sha256")
    atomic.check_ours(out, lambda path: _sha256(path) in {*known} - {None})


def _sha256(path: Path) -> str | None:
    """Returns the SHA-256 of a file that may hold budgets; None for one that cannot."""
    try:
        return hashlib.sha256(reading.read_bytes(path, limit=reading.JSON_BYTES)).hexdigest()
    except reading.FileError:
        return None


def _slices(opened: Model) -> tuple[int, ...]:
    """Returns the slice lengths of sparse prefill, in each of which the last queries vote."""
    if opened.options.slice is not None:
        return (opened.options.slice,)
    return EngineLayout.resolve(
        opened.config,
        EngineConfig(max_len=opened.config.max_len),
        platform=jax.default_backend(),
        sparse_slices=True,
    ).slices


def _watched(surveys, length: int, label: str):
    """Yields the surveys, and prints occasional lines of progress."""
    begin = said = time.monotonic()
    for start, count, survey in surveys:
        yield start, count, survey
        now, done = time.monotonic(), start + count
        if now - said >= LINE_S and done < length:
            said = now
            # Attention makes later slices slower: by tokens alone this is too hopeful.
            left = (now - begin) * ((length / done) ** 2 - 1)
            note(f"{label}: {done:,} done, at most {left:,.0f} s left")
