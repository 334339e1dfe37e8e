"""Task passkey: five digits in a repetitive text."""

from collections.abc import Callable

from qwen_jax.eval.material import Material
from qwen_jax.eval.prompt import Draft, TooShort
from qwen_jax.eval.tasks import Cell, Task

# The wording of arXiv:2305.16300, but that the question asks for a number: asked for the pass
# key, small models explain what pass keys are.
_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
_SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "\n\nWhat is the number of the pass key?"
_DIGITS = 5


def build(material: Material, cell: Cell) -> Task:
    """Builds the task of a cell, with the needle at `cell.depth`; raises as `Material.fit` does."""
    rng = material.rng(cell)
    key = "".join(rng.choice("0123456789") for _ in range(_DIGITS))
    draft = Draft(
        opening=_INTRODUCTION,
        needles=[(cell.depth or 0.0, _NEEDLE.format(key=key))],
        closing=_QUESTION,
    )
    return Task(prompt=material.fit(cell, draft, _Filler()), expected=(key,))


class _Filler:
    """Filler of five repeated sentences; a `prompt.Filler`."""

    def number(self, length: int, count: Callable[[int], int]) -> int:
        """Returns the number of units; not always the maximum, but that of published prompts."""
        shortest = count(0)
        if shortest > length:
            raise TooShort(shortest)
        sentence_len = (count(100) - shortest) / 100
        sentences = 0
        while more := int((length - count(sentences)) / sentence_len):
            sentences = max(0, sentences + more)
        while count(sentences) > length:
            sentences -= 1
        return sentences

    def pieces(self, n: int) -> list[str]:
        return [f" {_SENTENCES[index % len(_SENTENCES)]}" for index in range(n)]

    def index(self, depth: float, n: int) -> int:
        return round(depth * n)

    def rest(self, n: int) -> str:
        return " ".join(["", _SENTENCES[n % len(_SENTENCES)], *_SENTENCES])
