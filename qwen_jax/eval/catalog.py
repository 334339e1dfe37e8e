"""Catalog: tasks by name and by family, and grids of their cells."""

import dataclasses
from collections.abc import Callable

from qwen_jax.eval import needles, passkey, tracking, words
from qwen_jax.eval.material import Material
from qwen_jax.eval.tasks import Cell, Task, TaskError


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """A kind of question.

    Attributes:
        build: builds the question of a cell.
        max_new_tokens: maximum length of an answer in tokens.
        has_depth: whether the answer lies at one place of the prompt.
    """

    build: Callable[[Material, Cell], Task]
    max_new_tokens: int
    has_depth: bool = False


# Right answers take half of these tokens or less.
KINDS = {
    "passkey": Kind(passkey.build, 24, has_depth=True),
    "niah": Kind(needles.niah, 64, has_depth=True),
    "niah_single": Kind(needles.single, 64, has_depth=True),
    "niah_multikey": Kind(needles.multikey, 64),
    "niah_multivalue": Kind(needles.multivalue, 128),
    "vt": Kind(tracking.build, 64),
    "cwe": Kind(words.build, 128),
}
FAMILIES = {
    "passkey": ("passkey",),
    "niah": ("niah",),
    "ruler": ("niah_single", "niah_multikey", "niah_multivalue", "vt", "cwe"),
}


def grid(tasks: list[str], lengths: list[int], depths: list[float], samples: int) -> list[Cell]:
    """Returns all cells, the shortest and cheapest first.

    Raises:
        TaskError: if a value is out of range or given twice.
    """
    for name, values in (("task", tasks), ("length", lengths), ("depth", depths)):
        if len(set(values)) != len(values):
            raise TaskError(f"each {name} may be given once, got {values}")
    if samples < 1:
        raise TaskError(f"samples={samples} must be at least 1")
    return [
        Cell(length=length, task=task, depth=depth, sample=sample)
        for length in sorted(lengths)
        for task in tasks
        for depth in (sorted(depths) if KINDS[task].has_depth else [None])
        for sample in range(samples)
    ]
