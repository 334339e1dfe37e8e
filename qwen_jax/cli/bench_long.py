"""bench prefill, bench decode: one long prompt, of a checkpoint or of random weights."""

import contextlib
import dataclasses
import json as json_format
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.table import Table

from qwen_jax.cli.answer import answer
from qwen_jax.cli.console import console
from qwen_jax.cli.flags import Json, ModelFlags, note, option
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.cli.plan import OptionalModel, PublishedModel, opened_or_published, published
from qwen_jax.cli.profile import profiled
from qwen_jax.cli.quantities import tokens_option
from qwen_jax.config import ConfigError
from qwen_jax.engine.request import Request
from qwen_jax.llm.answer import Answer
from qwen_jax.llm.model import Model
from qwen_jax.llm.options import Within
from qwen_jax.models import presets
from qwen_jax.planner import devices

_Random = Annotated[
    bool, option("Make weights up; MODEL needs no more than a config.json.", "--random-weights")
]
_Tokens = Annotated[
    int,
    tokens_option("Length of the prompt; 1K is 1,024, 1M is 1,048,576, 1k is 1,000.", shown=True),
    Within(1),
]
_Repeats = Annotated[int, typer.Option(help="Runs, of which the median counts."), Within(1)]
_Split = Annotated[
    bool, typer.Option(help="Also say what the time goes into, by runs that leave parts out.")
]


@expand_on_hosts
@profiled
def prefill(
    model_flags: ModelFlags,
    model: OptionalModel = None,
    config: PublishedModel = None,
    random_weights: _Random = False,
    tokens: _Tokens = 32768,
    repeats: _Repeats = 1,
    split: _Split = True,
    json: Json = False,
):
    """Time the prefill of one long prompt of random tokens.

    Compilation is not counted. Random weights attend to all keys alike, so that sparse
    prefill finds less than in a text, and may compute more. What goes into attention,
    selection, linear layers and the rest is told from further runs, which leave them out.

    Examples:
        qwen-jax bench prefill ckpt/7b-1m --tokens 128K --sparse off
        qwen-jax bench prefill --config 7b-1m --random-weights --tokens 1M
    """
    with _opened(model, config, random_weights, model_flags) as opened:
        report = measure(opened, tokens, 1, repeats, random=random_weights, split=split)
    _show(report, json=json)


@expand_on_hosts
@profiled
def decode(
    model_flags: ModelFlags,
    model: OptionalModel = None,
    config: PublishedModel = None,
    random_weights: _Random = False,
    tokens: _Tokens = 32768,
    new_tokens: Annotated[
        int, tokens_option("Tokens decoded after it.", shown=True), Within(2)
    ] = 128,
    repeats: _Repeats = 1,
    split: _Split = True,
    json: Json = False,
):
    """Time decoding after one long prompt of random tokens, which is prefilled first.

    Compilation is not counted. What goes into attention, linear layers and the rest of a
    token is told from further runs, which leave them out.

    Examples:
        qwen-jax bench decode --config 14b-1m --random-weights --tokens 128K --new-tokens 64
    """
    with _opened(model, config, random_weights, model_flags) as opened:
        report = measure(opened, tokens, new_tokens, repeats, random=random_weights, split=split)
    _show(report, json=json)


def measure(
    opened: Model, tokens: int, new_tokens: int, repeats: int, *, random: bool, split: bool
) -> dict[str, Any]:
    """Times prefill and decode; returns medians and single runs, as a JSON object.

    The prompt may be longer than the checkpoint declares, because the answer is not used.

    Args:
        split: also measure the parts of the time, see `parts`.
    """
    weights = opened.weights(random=random)
    engine = opened.engine(tokens + new_tokens, weights=weights)
    described = engine.describe()
    runs = _runs(engine, opened, tokens, new_tokens, repeats)
    del engine  # its cache makes room for the next one's
    peak, sparse = devices.peak_bytes(), runs[0].sparse
    timed = _decode_s if new_tokens > 1 else _ttft
    report = {
        "engine": described,
        "weights": "random" if random else str(opened.directory),
        "prompt_tokens": tokens,
        "ttft_s": _ttft(runs),
        "prefill_tokens_per_s": tokens / _ttft(runs),
        "decode_tokens_per_s": 1 / _decode_s(runs) if new_tokens > 1 else None,
        "density": 1.0 if sparse is None else sparse.density,
        "recall": 1.0 if sparse is None else sparse.recall,
        "peak_bytes": peak,
        "runs": [each.timings.as_dict() for each in runs],
    }
    if split:

        def time(model: Model, weights) -> float:
            engine = model.engine(tokens + new_tokens, weights=weights, attention=False)
            return timed(_runs(engine, model, tokens, new_tokens, repeats))

        report["split_s"] = parts(
            time, opened, weights, timed(runs), sparse=sparse is not None, decode=new_tokens > 1
        )
    return report


def parts(
    time: Callable[[Model, Any], float],
    opened: Model,
    weights,
    whole: float,
    *,
    sparse: bool,
    decode: bool,
) -> dict[str, float]:
    """Splits the seconds of a prefill, or of a token, into parts, by differences between runs.

    *Linear* is layers without attention: projections, norms, MLP, and writing the cache. *Rest*
    is embedding, logits and host time; in prefill also the last layer, which computes one token.

    Args:
        time: returns the seconds of a model without its attention.
        whole: seconds of the unchanged model.
        sparse: whether prefill is sparse, so that selection is one of the parts.
        decode: whether these are seconds of a token.
    """
    bare = time(opened, weights)
    found = {"attention": whole - bare}
    if sparse and not decode:
        selecting, bare = bare, time(dataclasses.replace(opened, sparse=None), weights)
        found["selection"] = selecting - bare
    layers = opened.config.num_layers
    if layers > 1:
        one = dataclasses.replace(
            opened, config=dataclasses.replace(opened.config, num_layers=1), sparse=None
        )
        a_layer = (bare - time(one, _first_layer(weights))) / (layers - 1)
        found["linear"] = a_layer * (layers if decode else layers - 1)
    return found | {"rest": whole - sum(found.values())}


def _first_layer(weights) -> dict[str, Any]:
    """Returns the weights of a model with its first layer only, with the same placement."""

    def first(leaf):
        return jax.jit(lambda x: x[:1], out_shardings=leaf.sharding)(leaf)

    return weights | {"blocks": jax.tree.map(first, weights["blocks"])}


def _runs(engine, opened: Model, tokens: int, new_tokens: int, repeats: int) -> list[Answer]:
    """Answers prompts of random tokens, after a run that compiles everything."""
    rng = np.random.default_rng(0)

    def run(length: int, new: int) -> Answer:
        prompt = tuple(rng.integers(0, opened.config.vocab_size, length).tolist())
        done = answer(engine, Request(prompt=prompt, max_new_tokens=new), write=lambda text: None)
        if done.finish_reason == "cancelled":
            raise KeyboardInterrupt
        return done

    run(warm_up_tokens(tokens, engine.slices[0], opened), min(new_tokens, 2))
    runs: list[Answer] = []
    while len(runs) < repeats:
        before = engine.num_compilations
        done = run(tokens, new_tokens)
        if engine.num_compilations == before:
            runs.append(done)
        else:
            note("this run compiled something and is not counted")
    return runs


def _ttft(runs: list[Answer]) -> float:
    """Returns the median seconds to the first token."""
    return statistics.median(each.timings.ttft_s for each in runs)


def _decode_s(runs: list[Answer]) -> float:
    """Returns the median seconds per token after the first."""
    return 1 / statistics.median(each.timings.decode_tokens_per_s for each in runs)


def warm_up_tokens(tokens: int, largest: int, opened: Model) -> int:
    """Returns the length of a short prompt that needs the same programs as one of `tokens`.

    It has the same remainder after whole slices.
    """
    least = 2 * largest
    if opened.sparse is not None and tokens > opened.sparse.threshold:
        least = max(least, opened.sparse.threshold + 1)
    return min(tokens, least + (tokens - least) % largest)


@contextlib.contextmanager
def _opened(
    model: Path | None, config: str | None, random: bool, flags: ModelFlags
) -> Iterator[Model]:
    """Opens the named model, without its weights.

    Raises:
        ConfigError: if there is none, or more than one, or it has no weights.
    """
    preset = published(model, config)
    if preset is not None and not random:
        name = f"--config {config}" if model is None else str(model)
        raise ConfigError(
            f"{name} has no weights here: add --random-weights, give MODEL, or fetch it with: "
            f"qwen-jax download {presets.PUBLISHED[preset].hub_id}"
        )
    with opened_or_published(model, config, flags) as opened:
        yield opened


def _show(report: dict[str, Any], *, json: bool) -> None:
    if json:
        print(json_format.dumps(report))
        return
    rate = report["decode_tokens_per_s"]
    unit, factor = ("s", 1) if rate is None else ("ms a token", 1e3)
    rows = {
        "prompt": f"{report['prompt_tokens']:,} tokens",
        "weights": report["weights"],
        "first token after": f"{report['ttft_s']:.2f} s",
        "prefill": f"{report['prefill_tokens_per_s']:,.1f} tokens/s",
        **({"decode": f"{rate:,.1f} tokens/s"} if rate is not None else {}),
        **{
            f"  {part}": f"{factor * seconds:,.2f} {unit}"
            for part, seconds in report.get("split_s", {}).items()
        },
        "attention computed": f"{report['density']:.1%}",
        "attention found": f"{report['recall']:.1%}",
        "peak memory": f"{report['peak_bytes'] / 2**30:.2f} GiB",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows.items():
        table.add_row(*row)
    console().print(table)
