"""Prompts of an exact number of tokens, counted in pieces.

Tokens of a text are those of its pieces, as long as every piece but the first
begins with white space: tokenizers of the Qwen2 kind never join a word to the
space after it. So a piece is encoded once, however many lengths are tried, and
a whole prompt only once, as a check. Where the two disagree, the difference is
made up for and the prompt is built again.
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
    """What a prompt says, but for the filler.

    Attributes:
        opening: text before the filler.
        needles: sentences in the filler, each with its depth from 0 to 1.
        closing: text after the filler.
        answer: words that the model finds in its own mouth.
    """

    opening: str
    needles: Sequence[tuple[float, str]] = ()
    closing: str
    answer: str = ""


@runtime_checkable
class Filler(Protocol):
    """Text of any length, made of units."""

    def number(self, length: int, count: Callable[[int], int]) -> int:
        """Units to take for `length` tokens, if a prompt with n of them has `count(n)`.

        Raises:
            TooShort: if no number is small enough.
        """
        ...

    def pieces(self, n: int) -> list[str]:
        """The text of `n` units, in pieces that begin with white space."""
        ...

    def index(self, depth: float, n: int) -> int:
        """The piece of `pieces(n)` before which a depth lies."""
        ...

    def rest(self, n: int) -> str:
        """Text that might follow."""
        ...


class TooShort(Exception):
    """Even the shortest prompt is too long: it has `least` tokens."""

    def __init__(self, least: int):
        super().__init__(f"at least {least} tokens")
        self.least = least


def most(length: int, count: Callable[[int], int], least: int = 0) -> int:
    """The largest number from `least` on whose `count` is at most `length`; it must not fall.

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
    """A prompt in the checkpoint's chat format, of exactly `cell.length` tokens.

    What whole units leave over is made up by one that is broken off.

    Args:
        count: tokens of a piece of text, remembered.

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
    """The text of a user that takes `room` tokens, or None if no breaking off gives that."""

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
    """The pieces of the text of a user before the closing one."""
    pieces = filler.pieces(n)
    placed = [(filler.index(depth, n), f" {needle}") for depth, needle in draft.needles]
    # Backwards, so that each index still holds; needles at one place stay in order.
    for index, needle in sorted(placed, key=lambda place: place[0])[::-1]:
        pieces.insert(index, needle)
    pieces[0] = _TURN + draft.opening + pieces[0].lstrip()
    return pieces
