"""Task cwe (common words extraction): the most common words of a long list.

The wording and the frequencies are those of RULER (arXiv:2404.06654), preceded by its example.
Words are compounds, because a list of a million tokens needs more of them than a lexicon has.
"""

import math
import random
from collections.abc import Callable

from qwen_jax.eval import text
from qwen_jax.eval.material import Material
from qwen_jax.eval.prompt import Draft, most
from qwen_jax.eval.tasks import Cell, Task

_OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
_ANSWER = "Answer: The top 10 words that appear most often in the list are:"
_COMMON = 10
# From this length on words come 30 and 3 times, in the example 10 and 3 times; below it 6 times
# and once, in the example 3 times and once.
_LONG = 4096


def build(material: Material, cell: Cell) -> Task:
    """Builds a task with a list of words, ten of which are far more frequent than the others.

    Raises as `Material.fit` does.
    """
    rng = material.rng(cell)
    words = _words(rng)
    long = cell.length >= _LONG
    example = _List(words[:40] if long else words[:20], *((10, 3) if long else (3, 1)), rng)
    words = words[len(example.words) :]
    filler = _List(words, *((30, 3) if long else (6, 1)), rng)
    entries = "".join(example.pieces(example.whole)).strip()
    answer = " ".join(f"{rank + 1}. {word}" for rank, word in enumerate(example.words[:_COMMON]))
    draft = Draft(
        opening=f"{_OPENING}{entries}{_QUESTION}\n{_ANSWER} {answer}\n\n{_OPENING}",
        closing=_QUESTION,
        answer=_ANSWER,
    )
    return Task(prompt=material.fit(cell, draft, filler), expected=tuple(words[:_COMMON]))


class _List:
    """Filler that is a numbered list of words; a `prompt.Filler`.

    Attributes:
        words: all words, the common ones first.
    """

    def __init__(self, words: list[str], common: int, others: int, rng: random.Random):
        """Stores the words and their frequencies.

        Args:
            words: all words, the common ones first.
            common: occurrences of each common word.
            others: occurrences of each other word.
            rng: shuffles the list.
        """
        self.words = words
        self._common, self._others = common, others
        self._order = rng.random()

    @property
    def whole(self) -> int:
        """Number of entries of a list in which every word has its full frequency."""
        return self._common * _COMMON + self._others * (len(self.words) - _COMMON)

    def number(self, length: int, count: Callable[[int], int]) -> int:
        return most(length, count, least=self._common * _COMMON)

    def pieces(self, n: int) -> list[str]:
        entries = self._entries(n)
        return [
            piece
            for number, word in enumerate(entries, start=1)
            for piece in (f" {number}.", f" {word}")
        ]

    def index(self, depth: float, n: int) -> int:
        return 2 * round(depth * n)

    def rest(self, n: int) -> str:
        return "".join(f" {n + ahead}. {self.words[-ahead]}" for ahead in range(1, 7))

    def _entries(self, n: int) -> list[str]:
        common, others = self.words[:_COMMON], self.words[_COMMON:]
        # A list so long that there are too few words has all of them more often.
        rounds = max(1, math.ceil(n / self.whole))
        num_common = rounds * self._common * _COMMON
        entries = [word for word in others for _ in range(rounds * self._others)]
        entries = common * (rounds * self._common) + entries[: n - num_common]
        random.Random(f"{self._order} {n}").shuffle(entries)
        return entries


def _words(rng: random.Random) -> list[str]:
    """Returns shuffled compounds of two nouns; the first hundred are in none of the others."""
    nouns = text.nouns()
    words = sorted({first + second for first in nouns for second in nouns})
    rng.shuffle(words)
    joined = " ".join(words)
    unclear = {word for word in words[:200] if joined.count(word) > 1}
    return [word for word in words if word not in unclear]
