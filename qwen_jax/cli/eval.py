"""eval: how much a model still finds, by length and depth."""

import json as json_format
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qwen_jax.cli.flags import Json, Model, ModelArgument, ModelFlags, expand, note, open_model
from qwen_jax.config import ConfigError
from qwen_jax.eval import score, tasks

app = typer.Typer(
    help="Measure what a model still finds in long texts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

_HELP = """Hide five digits in filler and ask for them, over lengths and depths.

Each length is that of the whole prompt, exactly. Answers are greedy, and right if they
contain the digits. With --out every answer is kept as it comes, and the same command
goes on where it was stopped.

\b
Examples:
  qwen-jax eval passkey ckpt/7b-1m --lengths 32k,128k,512k --depths 0.1,0.5,0.9
  qwen-jax eval passkey demo --lengths 8k,12k --samples 3 --dca off --out off.jsonl
"""


@app.callback()
def _callback():
    """Measure what a model still finds in long texts."""


@expand
def passkey(
    model: ModelArgument,
    model_flags: ModelFlags,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens; 1k is 1000, 1K is 1024.")
    ] = "2k,4k,8k",
    depths: Annotated[
        str, typer.Option(help="Where the digits lie, from 0 (first) to 1 (last).")
    ] = "0.1,0.5,0.9",
    samples: Annotated[int, typer.Option(help="Questions per length and depth.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed hides the same digits.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="A file that keeps the answers, one JSON object a line.", metavar="FILE"),
    ] = None,
    json: Json = False,
):
    """See `_HELP`.

    Raises:
        ConfigError: if a flag cannot be used, or `out` holds something else.
        RequestError: if the longest prompt does not fit the model.
    """
    opened = open_model(model, model_flags)
    cells = tasks.grid(
        [whole_number(text) for text in _split("--lengths", lengths)],
        [_fraction(text) for text in _split("--depths", depths)],
        samples,
    )
    longest = max(cell.length for cell in cells)
    opened.check_fits(longest, score.MAX_NEW_TOKENS)
    log = score.Log(out, _settings(opened, seed)) if out else None
    known = log.results if log else {}
    results = [known[cell] for cell in cells if cell in known]
    missing = [cell for cell in cells if cell not in known]
    if results:
        note(f"{out} holds {len(results)} of {len(cells)} answers")
    if missing:
        results += _ask(opened, missing, seed, log, longest)
    table = score.accuracy(results)
    if json:
        _print_json(opened, seed, table)
    else:
        _print_table(table)


app.command("passkey", help=_HELP)(passkey)


def _ask(
    opened: Model, cells: list[tasks.Cell], seed: int, log: score.Log | None, longest: int
) -> list[score.Result]:
    tokenizer = opened.tokenizer()
    engine = opened.engine(longest + score.MAX_NEW_TOKENS, vocab_limit=tokenizer.size)
    results = []
    start = time.monotonic()
    for result in score.run(
        engine,
        tokenizer,
        cells,
        lambda cell: tasks.passkey(tokenizer, cell, seed=seed),
        eos_ids=opened.end_ids(tokenizer, chat=True),
    ):
        results.append(result)
        if log:
            log.add(result)
        now = time.monotonic()
        verdict = "right" if result.correct else f"wrong: {result.answer!r}"
        note(
            f"{len(results)}/{len(cells)}: {result.cell.length:,} tokens, depth "
            f"{result.cell.depth:g}, {now - start:.1f} s: {verdict}"
        )
        start = now
    return results


def whole_number(text: str) -> int:
    """Tokens as people write them: 12000, 12k (thousands), 12K (of 1,024), 1m, 1M.

    Raises:
        ConfigError: if it is no positive whole number of tokens.
    """
    units = {"": 1, "k": 1000, "m": 1000**2, "K": 1024, "M": 1024**2}
    match = re.fullmatch(r"(\d+)([kmKM]?)", text)
    if not match or not int(match[1]):
        raise ConfigError(f"length {text!r} must be tokens such as 12000, 12k or 12K")
    return int(match[1]) * units[match[2]]


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"depth {text!r} must be a number from 0 to 1") from None


def _split(flag: str, text: str) -> list[str]:
    values = [value.strip() for value in text.split(",")]
    if not all(values):
        raise ConfigError(f"{flag} {text!r} must be values with commas between them")
    return values


def _settings(opened: Model, seed: int) -> dict:
    """What the answers depend on, beside length and depth."""
    geometry = opened.config.dual_chunk
    return {
        "task": "passkey",
        "model": str(opened.directory.resolve()),
        "seed": seed,
        "dtype": opened.flags.dtype or "auto",
        "dca": [geometry.chunk_size, geometry.local_size] if geometry else None,
        "dca_original": opened.config.original_len,
        "vllm_parity": opened.flags.vllm_parity,
    }


def _print_json(opened: Model, seed: int, table: dict) -> None:
    cells = [
        {"length": length, "depth": depth, "right": right, "asked": asked}
        for (length, depth), (right, asked) in sorted(table.items())
    ]
    json_format.dump({**_settings(opened, seed), "cells": cells}, sys.stdout)
    print()


def _print_table(table: dict[tuple[int, float], tuple[int, int]]) -> None:
    lengths = sorted({length for length, _ in table})
    depths = sorted({depth for _, depth in table})
    shown = Table(title="right answers", title_justify="left", box=None, pad_edge=False)
    shown.add_column("tokens", justify="right")
    for depth in depths:
        shown.add_column(f"depth {depth:g}", justify="right")
    shown.add_column("all", justify="right")
    for length in lengths:
        row = [table[length, depth] for depth in depths]
        total = sum(right for right, _ in row), sum(asked for _, asked in row)
        shown.add_row(f"{length:,}", *(_share(*cell) for cell in (*row, total)))
    Console().print(shown)


def _share(right: int, asked: int) -> str:
    color = "green" if right == asked else "red" if right == 0 else "yellow"
    return f"[{color}]{right}/{asked}[/{color}]"
