"""Task vt (variable tracking): which variables hold a value, each set to the one before.

The wording is that of RULER (arXiv:2404.06654), preceded by its example.
"""

import random
import string

from qwen_jax.eval.material import Material
from qwen_jax.eval.prompt import Draft
from qwen_jax.eval.tasks import Cell, Task

_OPENING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)
_QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
_ANSWER = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are:"
)
_HOPS = 4
_CHAINS = 2
_LETTERS = 5
_DIGITS = 5


def build(material: Material, cell: Cell) -> Task:
    """Builds a task with two chains of five variables at random but ordered depths.

    One of the chains is asked for.

    Raises as `Material.fit` does.
    """
    rng = material.rng(cell)
    size = _HOPS + 1
    names = material.draw((_CHAINS + 1) * size, lambda: _name(rng))
    values = material.draw(_CHAINS + 1, lambda: _number(rng))
    *chains, example = [names[start : start + size] for start in range(0, len(names), size)]
    needles = []
    for chain, value in zip(chains, values, strict=False):
        depths = sorted(rng.random() for _ in chain)
        needles += zip(depths, _statements(chain, value), strict=True)
    draft = Draft(
        opening=_example(example, values[-1]) + _OPENING,
        needles=needles,
        closing=_QUESTION.format(value=values[0]),
        answer=_ANSWER.format(count=size, value=values[0]),
    )
    prompt = material.fit(cell, draft, material.haystack(cell))
    return Task(prompt=prompt, expected=tuple(chains[0]))


def _statements(chain: list[str], value: str) -> list[str]:
    sources = [value, *(f"VAR {name}" for name in chain)]
    return [f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=False)]


def _example(chain: list[str], value: str) -> str:
    question = _QUESTION.format(value=value)
    answer = _ANSWER.format(count=len(chain), value=value)
    return (
        f"{_OPENING}{' '.join(_statements(chain, value))}{question}\n{answer} {' '.join(chain)}\n\n"
    )


def _name(rng: random.Random) -> str:
    return "".join(rng.choice(string.ascii_uppercase) for _ in range(_LETTERS))


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
