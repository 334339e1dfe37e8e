"""Material of prompts: text, cached token counts, and seeded random numbers."""

import bisect
import functools
import itertools
import random
from collections.abc import Callable, Iterator

from qwen_jax.eval import prompt, text
from qwen_jax.eval.tasks import Cell
from qwen_jax.text.tokenizer import Tokenizer

_AHEAD = 6  # sentences from which one is broken off, so that some break has the right length


class Material:
    """Source of text and random choices for tasks; caches token counts."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        sentences: Iterator[str] | None = None,
        known: str = "",
    ):
        """Stores the source of text.

        Args:
            tokenizer: tokenizer that counts tokens.
            seed: equal seeds give equal tasks.
            sentences: infinite sequence of sentences; None to generate one for each sample.
            known: text of the sentences, none of whose words may be an answer.
        """
        self._tokenizer, self._seed, self._known = tokenizer, seed, known
        self._count = functools.cache(lambda piece: len(tokenizer.encode_text(piece)))
        self._given = Haystack(sentences, self._count) if sentences else None
        # A few only: a million tokens of sentences take some ten megabytes.
        self._made_up = functools.lru_cache(maxsize=8)(self._make_up)

    def rng(self, cell: Cell) -> random.Random:
        """Returns the random generator of a cell, which chooses what is asked."""
        return random.Random(f"{cell.task} {self._seed} {cell.length} {cell.depth!r} {cell.sample}")

    def haystack(self, cell: Cell) -> "Haystack":
        """Returns the filler text of a cell.

        It is the same for all lengths, depths and tasks of a sample, so that an engine that
        shares prompt prefixes need not prefill all of it again.
        """
        return self._given or self._made_up(cell.sample)

    def draw(self, number: int, make: Callable[[], str]) -> list[str]:
        """Draws `number` different strings, none of which occurs in the given text."""
        drawn: list[str] = []
        while len(drawn) < number:
            new = make()
            if new not in drawn and new not in self._known:
                drawn.append(new)
        return drawn

    def fit(self, cell: Cell, draft: prompt.Draft, filler: prompt.Filler) -> tuple[int, ...]:
        """Builds the prompt of a cell, see `prompt.fit`."""
        return prompt.fit(self._tokenizer, self._count, cell, draft, filler)

    def _make_up(self, sample: int) -> "Haystack":
        rng = random.Random(f"text {self._seed} {sample}")
        return Haystack(text.sentences(rng), self._count)


class Haystack:
    """Filler of sentences, which are taken lazily; a `prompt.Filler`."""

    def __init__(self, sentences: Iterator[str], count: Callable[[str], int]):
        """Starts without sentences.

        Args:
            sentences: infinite sequence of sentences.
            count: returns the number of tokens of a piece of text.
        """
        self._sentences, self._count = sentences, count
        self._pieces: list[str] = []
        self._ends = [0]

    def number(self, length: int, count: Callable[[int], int]) -> int:
        return prompt.most(length, count)

    def pieces(self, n: int) -> list[str]:
        self._take(n)
        return self._pieces[:n]

    def index(self, depth: float, n: int) -> int:
        self._take(n)
        at = depth * self._ends[n]
        after = bisect.bisect_left(self._ends, at, 0, n)
        return min(max(0, after - 1), after, key=lambda index: abs(self._ends[index] - at))

    def rest(self, n: int) -> str:
        self._take(n + _AHEAD)
        return "".join(self._pieces[n : n + _AHEAD])

    def _take(self, n: int) -> None:
        for sentence in itertools.islice(self._sentences, max(0, n - len(self._pieces))):
            piece = sentence if sentence[0].isspace() else f" {sentence}"
            self._pieces.append(piece)
            self._ends.append(self._ends[-1] + self._count(piece))
