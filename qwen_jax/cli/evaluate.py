"""Runs of `eval`: cells without an answer in the log, by one or several variants of a model."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from qwen_jax.cli.flags import note
from qwen_jax.cli.progress import Progress
from qwen_jax.distributed import multihost
from qwen_jax.eval import score, text
from qwen_jax.eval.catalog import FAMILIES, KINDS
from qwen_jax.eval.log import Log
from qwen_jax.eval.material import Material
from qwen_jax.eval.score import Result
from qwen_jax.eval.tasks import Cell
from qwen_jax.llm.model import Model


def settings(
    family: str, opened: Model, seed: int, given: str | None, *, dense_to: int | None = None
) -> dict[str, Any]:
    """Returns everything that answers depend on but cell and variant, for JSON.

    Args:
        given: text to hide needles in; None for a generated one.
        dense_to: longest prompt, in tokens, that is prefilled densely; None for the checkpoint's
            threshold.
    """
    return {
        "task": family,
        "seed": seed,
        "text": None if given is None else _digest(given),
        **opened.settings(dense_to=dense_to),
    }


def results(
    models: dict[str | None, Model],
    cells: list[Cell],
    material: Material,
    log: Log | None,
) -> list[Result]:
    """Returns a result for each variant and cell, from the log or the model; logs new ones.

    In a multi-process job only process 0 returns results from the log.

    Raises:
        CheckpointError: if the weights are missing, damaged or do not fit.
        ConfigError: if the device cannot do what the flags ask.
    """
    asked = [(name, cell) for name in models for cell in cells]
    known = log.results if log else {}
    found = {key: known[key] for key in asked if key in known}
    # Process 0 has the log; the others learn from it what need not be asked.
    numbers = multihost.broadcast_json(
        lambda: [number for number, key in enumerate(asked) if key in known]
    )
    answered = {asked[number] for number in numbers}
    if log and found:
        note(f"{log.path} holds {len(found)} of {len(asked)} answers")
    missing = {
        name: unanswered
        for name in models
        if (unanswered := [cell for cell in cells if (name, cell) not in answered])
    }
    if not missing:
        return list(found.values())
    weights = next(iter(models.values())).weights()
    longest = max(map(_room, cells))
    tokens, read = sum(cell.length for each in missing.values() for cell in each), 0
    with contextlib.closing(Progress(tokens)) as progress:

        def on_tokens(of_this: int) -> None:
            progress.update(read + of_this)

        for name, unanswered in missing.items():
            answers = _ask(
                models[name],
                name,
                unanswered,
                material,
                longest,
                weights,
                on_tokens,
            )
            for result in answers:
                read += result.cell.length
                found[name, result.cell] = result
                if log:
                    log.add(result)
    return [found[key] for key in asked if key in found]


def material(opened: Model, cells: list[Cell], *, seed: int, given: str | None) -> Material:
    """Builds the material of prompts, after checking that all cells can be built and fit.

    Raises:
        TaskError: if a length is too short for its task.
        TokenizerError: if the checkpoint has no usable tokenizer or chat format.
        RequestError: if the longest prompt does not fit the model.
    """
    longest = max(cells, key=_room)
    opened.check_fits(longest.length, KINDS[longest.task].max_new_tokens)
    sentences = None if given is None else _repeated(given)
    made = Material(opened.tokenizer(), seed=seed, sentences=sentences, known=given or "")
    for cell in {cell.task: cell for cell in reversed(cells)}.values():
        KINDS[cell.task].build(made, cell)  # the shortest of each task
    return made


def _ask(
    opened: Model,
    name: str | None,
    cells: list[Cell],
    material: Material,
    length: int,
    weights,
    on_tokens: Callable[[int], None],
) -> Iterator[Result]:
    """Yields the result of each cell; the engine is freed at its end."""
    tokenizer = opened.tokenizer()
    start = time.monotonic()
    results = score.run(
        opened.engine(length, vocab_limit=tokenizer.size, weights=weights),
        tokenizer,
        cells,
        lambda cell: KINDS[cell.task].build(material, cell),
        eos_ids=opened.end_ids(tokenizer, chat=True),
        variant=name,
        on_tokens=on_tokens,
    )
    for number, result in enumerate(results, start=1):
        now = time.monotonic()
        note(
            f"{number}/{len(cells)}: {_described(result)}, {now - start:.1f} s: {_verdict(result)}"
        )
        start = now
        yield result


def _described(result: Result) -> str:
    cell = result.cell
    parts = [
        result.variant,
        cell.task if cell.task not in FAMILIES else None,
        f"{cell.length:,} tokens",
        f"depth {cell.depth:g}" if cell.depth is not None else None,
    ]
    return ", ".join(part for part in parts if part)


def _verdict(result: Result) -> str:
    if result.score == 1:
        return "right"
    return f"{f'{result.score:.0%} right' if result.score else 'wrong'}: {result.answer!r}"


def _room(cell: Cell) -> int:
    """Returns the tokens of prompt and answer."""
    return cell.length + KINDS[cell.task].max_new_tokens


def _repeated(given: str) -> Iterator[str]:
    """Repeats the sentences of a text without end; prints a note when it starts again."""
    sentences = text.cut(given)
    yield from sentences
    note(f"the {len(sentences):,} sentences of --text are too few: they are repeated")
    while True:
        yield f"\n\n{sentences[0].lstrip()}"
        yield from sentences[1:]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
