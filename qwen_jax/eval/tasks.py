"""Cell and Task: a question of a grid, and the prompt that asks it."""

import dataclasses

from qwen_jax.config import ConfigError


class TaskError(ConfigError):
    """Error of a task that cannot be built; names the value and the remedy."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """One question of a grid.

    Attributes:
        length: length of the whole prompt in tokens.
        task: name of the task in `catalog.KINDS`.
        depth: position of the needle, from 0 (first) to 1 (last); None for a
            task without a single position.
        sample: index of the question among those with the same other fields.

    Raises:
        TaskError: if a value is out of range.
    """

    length: int
    task: str
    depth: float | None = None
    sample: int = 0

    def __post_init__(self):
        if self.length < 1:
            raise TaskError(f"length={self.length} must be at least 1 token")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise TaskError(f"depth={self.depth} must lie in [0, 1]")
        if self.sample < 0:
            raise TaskError(f"sample={self.sample} must not be negative")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompt, and the strings that a right answer contains, all of them."""

    prompt: tuple[int, ...]
    expected: tuple[str, ...]
