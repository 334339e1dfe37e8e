"""Observer: a callback that an engine calls around every step."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Literal, Protocol, runtime_checkable

Kind = Literal["prefill", "prefill_sparse", "decode", "score"]


@dataclasses.dataclass(slots=True, kw_only=True)
class Step:
    """A prefill slice, a slice of `score`, or a decode step.

    Attributes:
        requests: ids of the requests that it serves, one per sequence; none for `score`.
        start: tokens of the sequence that the cache held before it; the maximum over sequences.
        tokens: tokens that it computes, without padding.
        size: tokens that it computes, padding included.
        pages: cache pages in use while it runs.
        replica: index of the replica that runs it.
        compiled: number of programs compiled during it; set when it is over.
        density: for a sparse slice, computed pairs of query and key as a fraction of the causal
            ones, averaged over layers and heads; set when it is over.
        recall: for a sparse slice, attention mass of the computed pairs as a fraction of all,
            averaged over layers and heads; set when it is over.
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
    """Callback that an engine calls before each step."""

    def __call__(self, step: Step) -> AbstractContextManager[None]:
        """Returns the context in which the step runs, exited when the device has finished it.

        Steps of replicas overlap, each in its own thread.
        """
        ...


@runtime_checkable
class Observed(Protocol):
    """An engine, or several side by side."""

    def observe(self, observer: Observer | None) -> None:
        """Calls `observer` around every step from now on; None removes the observer."""
        ...
