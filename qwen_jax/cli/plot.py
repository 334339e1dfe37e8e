"""plot: pictures of scores and of attention recall, in the terminal or as PNG."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qwen_jax.cli.eval import whole_number
from qwen_jax.cli.flags import note, option
from qwen_jax.eval import heatmap, plot, sources, terminal

app = typer.Typer(
    help="Draw what `eval` and `calibrate` found.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Out = Annotated[
    Path | None,
    option("A PNG to write instead of drawing in the terminal.", "--out", metavar="FILE.png"),
]
Csv = Annotated[
    Path | None, option("A file for the numbers of the picture.", "--csv", metavar="FILE")
]

_EVAL_HELP = """Draw the mean score by length and depth, from logs of `eval --out`.

One map for each task and variant in each log; cells that were not asked stay empty.
Without --out the maps are drawn in the terminal.

\b
Examples:
  qwen-jax plot eval dca.jsonl
  qwen-jax plot eval dca.jsonl rope.jsonl --out needles.png --csv needles.csv
"""
_RECALL_HELP = """Draw attention recall and kept density by layer and head.

REPORT is what `calibrate` writes. Without --out the maps are drawn in the terminal.

\b
Examples:
  qwen-jax plot recall report.json
  qwen-jax plot recall report.json --length 16K --out recall.png
"""


@app.callback()
def _callback():
    """Draw what `eval` and `calibrate` found."""


@app.command("eval", help=_EVAL_HELP)
def scores(
    logs: Annotated[
        list[Path],
        typer.Argument(metavar="LOG", help="What `eval --out` wrote.", show_default=False),
    ],
    out: Out = None,
    csv: Csv = None,
):
    """See `_EVAL_HELP`.

    Raises:
        PlotError: if a log or `out` cannot be used.
    """
    _deliver(sources.scores(logs), out, csv)


@app.command("recall", help=_RECALL_HELP)
def recall(
    report: Annotated[
        Path, typer.Argument(metavar="REPORT", help="What `calibrate` wrote.", show_default=False)
    ],
    length: Annotated[
        str | None,
        option("Prompt length of the report to draw, as 16384 or 16K; the longest.", metavar="N"),
    ] = None,
    out: Out = None,
    csv: Csv = None,
):
    """See `_RECALL_HELP`.

    Raises:
        ConfigError: if the report, `length` or `out` cannot be used.
    """
    _deliver(sources.recall(report, whole_number(length) if length else None), out, csv)


def _deliver(panels: heatmap.Panels, out: Path | None, csv: Path | None) -> None:
    if out:
        plot.save_heat_maps(panels, out)
        note(f"wrote {out}")
    else:
        terminal.show_heat_maps(panels, Console())
    if csv:
        heatmap.write_csv(panels, csv)
        note(f"wrote {csv}")
