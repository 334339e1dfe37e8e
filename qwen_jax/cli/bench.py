"""bench: speed of prefill and decode on this device."""

import json as json_format
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from qwen_jax.cli import quantities
from qwen_jax.cli.console import console
from qwen_jax.cli.flags import Json, ModelArgument, ModelFlags, Reads
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.cli.profile import profiled
from qwen_jax.cli.quantities import tokens_option
from qwen_jax.engine.request import Request
from qwen_jax.llm.model import open_model
from qwen_jax.llm.options import Within


@expand_on_hosts
@profiled
def bench(
    model: ModelArgument,
    model_flags: ModelFlags,
    lengths: Annotated[
        str,
        typer.Option(help="Prompt lengths in tokens; 1K is 1,024, 1M is 1,048,576, 1k is 1,000."),
        Reads(quantities.lengths),
    ] = "2K,4K",
    new_tokens: Annotated[
        int,
        tokens_option("Tokens decoded after the first of these lengths.", shown=True),
        Within(2),
    ] = 128,
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts."), Within(1)] = 3,
    json: Json = False,
):
    """Measure prefill and decode on prompts of random tokens.

    Compilation is not counted: each program runs once before it is timed.

    Examples:
        qwen-jax bench ckpt/7b-1m --lengths 32K,128K --repeats 5
    """
    opened = open_model(model, model_flags)
    sizes = quantities.lengths(lengths)
    opened.check_fits(max(sizes), new_tokens)
    engine = opened.engine(max(sizes) + new_tokens)
    rng = np.random.default_rng(0)

    def prompt(size: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, opened.config.vocab_size, size).tolist())

    rows: list[dict[str, Any]] = []
    # Every slice shape once, so that the runs that count compile nothing.
    for size in sizes:
        run(engine, prompt(size), 2)
    for size in sizes:
        seconds = [run(engine, prompt(size), 1)[0] for _ in range(repeats)]
        rows.append(row("prefill", size, size, seconds))
    seconds = [run(engine, prompt(sizes[0]), new_tokens)[1] for _ in range(repeats)]
    rows.append(row("decode", sizes[0], new_tokens - 1, seconds))
    if json:
        print(json_format.dumps({"engine": engine.describe(), "rows": rows}))
        return
    table = Table("", "context", "tokens/s", "seconds (median)")
    for each in rows:
        table.add_row(
            each["what"],
            f"{each['context']:,}",
            f"{each['tokens_per_s']:.1f}",
            f"{each['median_s']:.3f}",
        )
    console().print(table)


def run(
    engine, prompt: tuple[int, ...], new_tokens: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Returns seconds to the first token of a greedy answer, and from there to its last."""
    start = first = clock()
    engine.add(Request(prompt=prompt, max_new_tokens=new_tokens))
    count = 0
    while engine.busy:
        for event in engine.step():
            if event.tokens and not count:
                first = clock()
            count += len(event.tokens)
    return first - start, clock() - first


def row(what: str, context: int, tokens: int, seconds: list[float]) -> dict[str, Any]:
    """Returns one row of the table, as a JSON object."""
    median = statistics.median(seconds)
    return {
        "what": what,
        "context": context,
        "median_s": median,
        "tokens_per_s": tokens / median,
        "seconds": seconds,
    }
