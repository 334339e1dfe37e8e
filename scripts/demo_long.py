"""Read a long document with dense and with sparse prefill, side by side.

A pass key lies hidden in 24,576 tokens, three times what the model was trained on. Ends with
status 0 only if both give the same answer, a sentence, and it names the pass key.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import demo_model
from rich.console import Console
from rich.table import Table

from qwen_jax.cli.answer import answer, write
from qwen_jax.cli.flags import ModelFlags
from qwen_jax.engine.request import Request
from qwen_jax.eval.catalog import KINDS
from qwen_jax.eval.material import Material
from qwen_jax.eval.tasks import Cell
from qwen_jax.llm.answer import Answer
from qwen_jax.llm.model import Model, open_model
from qwen_jax.text.tokenizer import Stream

BUDGETS = Path(__file__).parents[1] / "docs" / "demo" / "sparse_attention_config.json"
CELL = Cell(task="passkey", length=24_576, depth=0.1)


def run(directory: Path) -> bool:
    """Runs the demo; returns True if both answers are the same and right."""
    demo_model.fetch(directory)
    return compare(
        CELL, {"": open_model(directory, ModelFlags(sparse="on", sparse_config=BUDGETS))}
    )


def compare(cell: Cell, places: dict[str, Model]) -> bool:
    """Asks densely and sparsely in each place; returns True if all answers are equal and right.

    Args:
        cell: cell of the question.
        places: opened model with budgets, by name of the place where it runs.
    """
    answers: dict[str, Answer] = {}
    for place, opened in places.items():
        tokenizer = opened.tokenizer()
        kind = KINDS[cell.task]
        task = kind.build(Material(tokenizer), cell)
        request = Request(
            prompt=task.prompt,
            max_new_tokens=kind.max_new_tokens,
            eos_ids=opened.end_ids(tokenizer, chat=True),
        )
        tree = opened.weights()
        for name, way in (("dense", dataclasses.replace(opened, sparse=None)), ("sparse", opened)):
            name = f"{name} {place}".strip()
            print(f"\n{name}: prefill of {len(task.prompt):,} tokens", flush=True)
            engine = way.engine(
                len(task.prompt) + kind.max_new_tokens, vocab_limit=tokenizer.size, weights=tree
            )
            stream = Stream(tokenizer, stop=(".",))
            answers[name] = answer(engine, request, stream=stream, write=write)
            print()
            del engine  # and its cache
    print()
    Console().print(_table(answers))
    (number,) = task.expected
    print(f"\nThe pass key is {number}.")
    texts = {each.text or "" for each in answers.values()}
    return len(texts) == 1 and number in texts.pop()


def _table(answers: dict[str, Answer]) -> Table:
    table = Table("", *answers, box=None, pad_edge=False)
    rows: dict[str, Callable[[Answer], str]] = {
        "first token after": lambda each: f"{each.timings.ttft_s:.1f} s",
        "attention computed": lambda each: f"{each.sparse.density:.1%}" if each.sparse else "100%",
        "attention found": lambda each: f"{each.sparse.recall:.1%}" if each.sparse else "100%",
        "in the worst head": lambda each: (
            f"{each.sparse.least_recall:.1%}" if each.sparse else "100%"
        ),
        "answer": lambda each: " ".join((each.text or "").split()),
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, answers.values()))
    return table


if __name__ == "__main__":
    sys.exit(demo_model.demonstrate(run, __doc__))
