"""What the converter needs of the processes that share its work."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Team(Protocol):
    """Processes that do the same in the same order; what they exchange must survive JSON."""

    def is_alone(self) -> bool:
        """Whether there is no other process."""
        ...

    def is_first(self) -> bool:
        """Whether this process does what only one may."""
        ...

    def local_share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of some items that this process works on."""
        ...

    def broadcast_json(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all of them."""
        ...

    def all_gather_json(self, value: T) -> list[T]:
        """What each process gives, on all of them."""
        ...

    def await_all(self) -> None:
        """Returns when every process has come here."""
        ...


class Alone:
    """The team of one process."""

    def is_alone(self) -> bool:
        return True

    def is_first(self) -> bool:
        return True

    def local_share(self, items: Sequence[T]) -> Sequence[T]:
        return items

    def broadcast_json(self, make: Callable[[], T]) -> T:
        return make()

    def all_gather_json(self, value: T) -> list[T]:
        return [value]

    def await_all(self) -> None:
        pass


ALONE = Alone()
