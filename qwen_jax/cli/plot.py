"""plot: pictures of scores and of attention recall, in the terminal or as PNG."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from qwen_jax.cli import command
from qwen_jax.cli.console import console
from qwen_jax.cli.flags import ModelArgument, ModelFlags, expand, note, option, spelled
from qwen_jax.cli.placement import one_device
from qwen_jax.cli.quantities import tokens_option
from qwen_jax.config import ConfigError
from qwen_jax.engine.engine import Engine
from qwen_jax.eval import heatmap, plot, sources, terminal
from qwen_jax.eval.plan_picture import PlanPicture
from qwen_jax.llm import documents
from qwen_jax.llm.model import Model, open_model
from qwen_jax.llm.options import Within

app = command.App("Draw what `eval` and `calibrate` found.")

Out = Annotated[
    Path | None,
    option("A PNG to write instead of drawing in the terminal.", "--out", metavar="FILE.png"),
]
Csv = Annotated[
    Path | None, option("A file for the numbers of the picture.", "--csv", metavar="FILE")
]


@app.verb("eval")
def scores(
    logs: Annotated[
        list[Path],
        typer.Argument(metavar="LOG", help="What `eval --out` wrote.", show_default=False),
    ],
    out: Out = None,
    csv: Csv = None,
):
    """Draw the mean score by length and depth, from logs of `eval --out`.

    One map for each task and variant in each log; cells that were not asked stay empty.
    Without --out the maps are drawn in the terminal.

    Examples:
        qwen-jax plot eval dca.jsonl
        qwen-jax plot eval dca.jsonl rope.jsonl --out needles.png --csv needles.csv

    Raises:
        PlotError: if a log or `out` cannot be used.
    """
    _deliver(sources.scores(logs), out, csv)


@app.verb("recall")
def recall(
    report: Annotated[
        Path, typer.Argument(metavar="REPORT", help="What `calibrate` wrote.", show_default=False)
    ],
    length: Annotated[
        int | None,
        tokens_option("Prompt length of the report to draw, as 16384 or 16K; the longest."),
        Within(1),
    ] = None,
    out: Out = None,
    csv: Csv = None,
):
    """Draw attention recall and kept density by layer and head.

    REPORT is what `calibrate` writes. Without --out the maps are drawn in the terminal.

    Examples:
        qwen-jax plot recall report.json
        qwen-jax plot recall report.json --length 16K --out recall.png

    Raises:
        ConfigError: if the report, `length` or `out` cannot be used.
    """
    _deliver(sources.recall(report, length), out, csv)


def _deliver(panels: heatmap.Panels, out: Path | None, csv: Path | None) -> None:
    if out is not None:
        plot.check_picture(out)
    if csv is not None:
        heatmap.check_csv(csv)
        if out is not None and out.resolve() == csv.resolve():
            raise ConfigError(f"--out and --csv are one file, {out}: give two")
    if out:
        plot.save_heat_maps(panels, out)
        note(f"wrote {out}")
    else:
        terminal.show_heat_maps(panels, console())
    if csv:
        heatmap.write_csv(panels, csv)
        note(f"wrote {csv}")


@expand
def plan(
    model: ModelArgument,
    model_flags: ModelFlags,
    file: Annotated[
        list[Path], option("A text file or a directory; may be given repeatedly.", metavar="PATH")
    ],
    layer: Annotated[int, typer.Option(help="From 0; the last is never sparse."), Within(0)] = 0,
    head: Annotated[int, typer.Option(help="Query head, from 0."), Within(0)] = 0,
    tokens: Annotated[int | None, tokens_option("Read only so many tokens."), Within(1)] = None,
    out: Out = None,
):
    """Draw which keys one head reads of a text in sparse prefill.

    Queries go down, keys to the right; the text is prefilled for it. Without --out the
    picture is drawn in the terminal.

    Examples:
        qwen-jax plot plan ckpt/7b-1m --file book.txt --layer 3 --head 5 --out plan.png

    Raises:
        ConfigError: if the model has no budgets, or a flag cannot be used.
        DocumentError: if a named path holds no text.
    """
    if out is not None:
        plot.check_picture(out)
    mesh = one_device(model_flags.mesh, "plans are made")
    opened = open_model(model, dataclasses.replace(model_flags, sparse="on", mesh=mesh))
    _check_head(opened, layer, head)
    ids = tuple(
        opened.tokenizer().encode_prompt(
            documents.joined(documents.read(file, skipped=note, spell=spelled), "")
        )
    )
    ids = ids[:tokens]
    opened.check_fits(len(ids))
    engine = opened.engine(len(ids))
    assert isinstance(engine, Engine)  # on one device
    slices, density, recall, pairs = [], 0.0, 0.0, 0
    for start, length, listed, report in engine.plans(ids, layer, head):
        slices.append((start, length, listed))
        new = length * start + length * (length + 1) // 2
        density += float(report.density[layer, head]) * new
        recall += float(report.recall[layer, head]) * length
        pairs += new
    assert opened.sparse is not None
    geometry = opened.config.dual_chunk
    picture = PlanPicture(
        tokens=len(ids),
        tiles=slices[0][2].tiles,
        slices=tuple(slices),
        chunk_len=geometry.chunk_len if geometry else None,
        layer=layer,
        head=head,
        vertical=opened.sparse.vertical[layer][head],
        slash=opened.sparse.slash[layer][head],
        density=density / pairs,
        recall=recall / len(ids),
    )
    if out is None:
        terminal.show_plan(picture, console())
    else:
        plot.save_plan(picture, out)
        note(f"wrote {out}")


def _check_head(opened: Model, layer: int, head: int) -> None:
    """Checks, before weights are loaded, that the prefill of a head can be sparse.

    Raises:
        ConfigError: naming the flag.
    """
    if opened.config.num_layers == 1:
        raise ConfigError("a model of one layer is prefilled densely: its only one is the last")
    counts = {
        "--layer": (layer, opened.config.num_layers - 1),
        "--head": (head, opened.config.num_heads),
    }
    for flag, (value, count) in counts.items():
        if value >= count:
            raise ConfigError(f"{flag} {value} must be from 0 to {count - 1}")


app.verb("plan")(plan)
