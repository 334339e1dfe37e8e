"""Observer: somebody who is told of every step of an engine."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Literal, Protocol, runtime_checkable

Kind = Literal["prefill", "prefill_sparse", "decode", "score"]


@dataclasses.dataclass(slots=True, kw_only=True)
class Step:
    """A prefill slice, a slice of `score`, or a decode step.

    Attributes:
        requests: ids of those that it works for, one a sequence; none of `score`.
        start: tokens that the cache held of the sequence before it; of several the most.
        tokens: tokens that it computes.
        size: those and padding, which the program computes too.
        pages: cache pages that are in use while it runs.
        replica: which of several engines side by side runs it.
        compiled: programs that were compiled in it; known when it is over.
        density: of a sparse slice, pairs of query and key computed, as a share of the causal
            ones: the mean over layers and heads; known when it is over.
        recall: of a sparse slice, attention found, of what dense prefill would have found:
            the mean over layers and heads; known when it is over.
    """

    kind: Kind
    requests: tuple[int, ...]
    start: int
    tokens: int
    size: int
    pages: int
    replica: int = 0
    compiled: int = 0
    density: float | None = None
    recall: float | None = None


@runtime_checkable
class Observer(Protocol):
    """What an engine calls before each step."""

    def __call__(self, step: Step) -> AbstractContextManager[None]:
        """What the step runs within; it is left when the device has done the step.

        Steps of replicas overlap, each in a thread of its own.
        """
        ...


@runtime_checkable
class Observed(Protocol):
    """An engine, or several side by side."""

    def observe(self, observer: Observer | None) -> None:
        """Tells an observer of every step from now on; None for nobody."""
        ...
