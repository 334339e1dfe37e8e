"""Prompts with one right answer: a pass key hidden in filler, at an exact length and depth."""

import dataclasses
import itertools
import random

from qwen_jax.config import ConfigError
from qwen_jax.tokenizer import Tokenizer

# The wording of arXiv:2305.16300, but that the question asks for a number: asked for the pass
# key, small models explain what pass keys are.
_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "\n\nWhat is the number of the pass key?"
_DIGITS = 5


class TaskError(ConfigError):
    """A task that cannot be built; the text names the value and the way out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """One question of a grid.

    Attributes:
        length: of the whole prompt, in tokens.
        depth: where the needle lies, from 0 (first) to 1 (last).
        sample: number of the question among those of the same length and depth.

    Raises:
        TaskError: if a value is out of range.
    """

    length: int
    depth: float
    sample: int = 0

    def __post_init__(self):
        if self.length < 1:
            raise TaskError(f"length={self.length} must be at least 1 token")
        if not 0 <= self.depth <= 1:
            raise TaskError(f"depth={self.depth} must lie in [0, 1]")
        if self.sample < 0:
            raise TaskError(f"sample={self.sample} must not be negative")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompt and the text that a right answer contains."""

    prompt: tuple[int, ...]
    expected: str


def grid(lengths: list[int], depths: list[float], samples: int) -> list[Cell]:
    """All cells, shortest first, so that a table fills from the cheap end.

    Raises:
        TaskError: if a value is out of range or given twice.
    """
    for name, values in (("length", lengths), ("depth", depths)):
        if len(set(values)) != len(values):
            raise TaskError(f"each {name} may be given once, got {values}")
    if samples < 1:
        raise TaskError(f"samples={samples} must be at least 1")
    cells = itertools.product(sorted(lengths), sorted(depths), range(samples))
    return [Cell(length=length, depth=depth, sample=sample) for length, depth, sample in cells]


def passkey(tokenizer: Tokenizer, cell: Cell, *, seed: int = 0) -> Task:
    """The question of a cell, in the checkpoint's chat format, of exactly `cell.length` tokens.

    Equal arguments give equal prompts; the key depends on the cell and on `seed`.

    Raises:
        TaskError: if the length is too short for the question.
        TokenizerError: if the checkpoint has no chat format.
    """
    rng = random.Random(f"passkey {seed} {cell.length} {cell.depth!r} {cell.sample}")
    key = "".join(rng.choice("0123456789") for _ in range(_DIGITS))
    needle = _NEEDLE.format(key=key)

    def prompt(sentences: int, letters: int = 0) -> tuple[int, ...]:
        filler = [_FILLER[index % len(_FILLER)] for index in range(sentences)]
        broken_off = " ".join(["", _FILLER[sentences % len(_FILLER)], *_FILLER])[:letters]
        filler.insert(round(cell.depth * sentences), needle)
        text = _INTRODUCTION + " ".join(filler) + broken_off + _QUESTION
        return tuple(tokenizer.encode_chat([{"role": "user", "content": text}]))

    shortest = len(prompt(0))
    if shortest > cell.length:
        raise TaskError(
            f"length={cell.length} is too short: the question alone takes {shortest} tokens"
        )
    sentence_len = (len(prompt(100)) - shortest) / 100
    sentences = 0
    while more := int((cell.length - len(prompt(sentences))) / sentence_len):
        sentences = max(0, sentences + more)
    while len(prompt(sentences)) > cell.length:
        sentences -= 1
    # A sentence that is broken off makes up the rest.
    for letters in range(len(" ".join(_FILLER))):
        ids = prompt(sentences, letters)
        if len(ids) == cell.length:
            return Task(prompt=ids, expected=key)
    raise TaskError(f"length={cell.length} cannot be met exactly with this tokenizer")
