"""Tasks niah, niah_single, niah_multikey and niah_multivalue: magic numbers in a text.

The wording is that of RULER (arXiv:2404.06654), whose first task is that of
https://github.com/gkamradt/LLMTest_NeedleInAHaystack with numbers. As in RULER, its tasks
include the beginning of the answer in the prompt.
"""

import random

from qwen_jax.eval import text
from qwen_jax.eval.material import Material
from qwen_jax.eval.prompt import Draft
from qwen_jax.eval.tasks import Cell, Task

_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n",
    "\nWhat is the special magic number for {key} mentioned in the provided text?",
    "The special magic number for {key} mentioned in the provided text is",
)
_SEVERAL = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n",
    "\nWhat are all the special magic numbers for {key} mentioned in the provided text?",
    "The special magic numbers for {key} mentioned in the provided text are",
)
_MANY = 4
_DIGITS = 7


def niah(material: Material, cell: Cell) -> Task:
    """Builds a task with one needle at `cell.depth` and a free answer.

    Raises as `Material.fit` does.
    """
    return _build(material, cell, begun=False)


def single(material: Material, cell: Cell) -> Task:
    """Builds a task with one needle at `cell.depth`. Raises as `Material.fit` does."""
    return _build(material, cell)


def multikey(material: Material, cell: Cell) -> Task:
    """Builds a task with a needle among three with other keys, at random depths.

    Raises as `Material.fit` does.
    """
    return _build(material, cell, keys=_MANY)


def multivalue(material: Material, cell: Cell) -> Task:
    """Builds a task with four needles of the same key, at random depths.

    Raises as `Material.fit` does.
    """
    return _build(material, cell, values=_MANY)


def _build(
    material: Material, cell: Cell, *, keys: int = 1, values: int = 1, begun: bool = True
) -> Task:
    rng = material.rng(cell)
    adjectives, nouns = text.adjectives(), text.nouns()
    names = material.draw(keys, lambda: f"{rng.choice(adjectives)}-{rng.choice(nouns)}")
    numbers = material.draw(keys * values, lambda: _number(rng))
    needles = [
        (
            rng.random() if cell.depth is None else cell.depth,
            _NEEDLE.format(key=names[index // values], value=number),
        )
        for index, number in enumerate(numbers)
    ]
    opening, question, answer = _ONE if values == 1 else _SEVERAL
    draft = Draft(
        opening=opening,
        needles=needles,
        closing=question.format(key=names[0]),
        answer=answer.format(key=names[0]) if begun else "",
    )
    prompt = material.fit(cell, draft, material.haystack(cell))
    return Task(prompt=prompt, expected=tuple(numbers[:values]))


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
