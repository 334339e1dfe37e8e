"""Prompts of an exact number of tokens, counted in pieces.

The number of tokens of a text is the sum over its pieces, as long as every piece but the first
begins with white space: Qwen2's pre-tokenizer never joins a word to the
space after it. So a piece is encoded once, however many lengths are tried, and
a whole prompt only once, as a check. If the two disagree, the prompt is built again for a
corrected length.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from qwen_jax.eval.tasks import Cell, TaskError
from qwen_jax.text.tokenizer import Tokenizer

_TURN = "user\n"  # what `Tokenizer.encode_turn` puts before the text of a user
_ATTEMPTS = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Parts of a prompt beside the filler.

    Attributes:
        opening: text before the filler.
        needles: sentences to insert in the filler, each with its depth from 0 to 1.
        closing: text after the filler.
        answer: beginning of the model's answer, part of the prompt.
    """

    opening: str
    needles: Sequence[tuple[float, str]] = ()
    closing: str
    answer: str = ""


@runtime_checkable
class Filler(Protocol):
    """Filler text of any length, made of units."""

    def number(self, length: int, count: Callable[[int], int]) -> int:
        """Returns the number of units for a prompt of at most `length` tokens.

        Args:
            count: returns the tokens of a prompt with so many units.

        Raises:
            TooShort: if no number is small enough.
        """
        ...

    def pieces(self, n: int) -> list[str]:
        """Returns the text of `n` units, in pieces that begin with white space."""
        ...

    def index(self, depth: float, n: int) -> int:
        """Returns the index in `pieces(n)` at which a needle of this depth is inserted."""
        ...

    def rest(self, n: int) -> str:
        """Returns text that continues `n` units, to fill up the last tokens."""
        ...


class TooShort(Exception):
    """Raised if even the shortest prompt is too long: it has `least` tokens."""

    def __init__(self, least: int):
        super().__init__(f"at least {least} tokens")
        self.least = least


def most(length: int, count: Callable[[int], int], least: int = 0) -> int:
    """Returns the largest number >= `least` whose `count`, monotonic, is at most `length`.

    Raises:
        TooShort: if there is none.
    """
    if count(least) > length:
        raise TooShort(count(least))
    above = least + 1
    while (counted := count(above)) <= length:
        above = max(above + 1, int(1.02 * above * length / counted))
    return bisect.bisect_right(range(least, above), length, key=count) + least - 1


def fit(
    tokenizer: Tokenizer, count: Callable[[str], int], cell: Cell, draft: Draft, filler: Filler
) -> tuple[int, ...]:
    """Builds a prompt in the checkpoint's chat format, of exactly `cell.length` tokens.

    The tokens that whole units leave over are filled with a truncated unit.

    Args:
        count: returns the number of tokens of a piece of text, cached.
        cell: cell whose length the prompt has.
        draft: parts of the prompt beside the filler.
        filler: text that fills the prompt.

    Raises:
        TaskError: if the length is too short, or cannot be met.
        TokenizerError: if the checkpoint has no chat format.
    """
    answer = tokenizer.encode_text(draft.answer) if draft.answer else []
    empty = tokenizer.encode_chat([{"role": "user", "content": ""}])
    around = len(empty) + len(answer) - count(_TURN)
    room = cell.length - around
    for _ in range(_ATTEMPTS):
        try:
            content = _content(count, draft, filler, room)
        except TooShort as error:
            raise TaskError(
                f"length={cell.length} is too short: the question of {cell.task} alone takes "
                f"{error.least + around} tokens"
            ) from None
        if content is None:
            break
        ids = tokenizer.encode_chat([{"role": "user", "content": content}]) + answer
        if len(ids) == cell.length:
            return tuple(ids)
        room += cell.length - len(ids)
    raise TaskError(f"length={cell.length} cannot be met exactly with this tokenizer")


def _content(count: Callable[[str], int], draft: Draft, filler: Filler, room: int) -> str | None:
    """Builds a user message of `room` tokens; None if no truncated unit makes it so long."""

    def total(n: int) -> int:
        *body, last = _assemble(draft, filler, n)
        return sum(map(count, body)) + count(last + draft.closing)

    units = filler.number(room, total)
    for n in range(units, max(units - _ATTEMPTS, -1), -1):
        *body, last = _assemble(draft, filler, n)
        left = room - sum(map(count, body))
        rest = filler.rest(n)
        for letters in range(len(rest)):
            tail = last + rest[:letters] + draft.closing
            if count(tail) == left:
                return "".join([*body, tail]).removeprefix(_TURN)
    return None


def _assemble(draft: Draft, filler: Filler, n: int) -> list[str]:
    """Returns the pieces of the user message before the closing one."""
    pieces = filler.pieces(n)
    placed = [(filler.index(depth, n), f" {needle}") for depth, needle in draft.needles]
    # Backwards, so that each index still holds; needles at one place stay in order.
    for index, needle in sorted(placed, key=lambda place: place[0])[::-1]:
        pieces.insert(index, needle)
    pieces[0] = _TURN + draft.opening + pieces[0].lstrip()
    return pieces
