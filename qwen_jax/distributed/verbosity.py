"""How much a command says on stderr beside errors; one level for all of this process."""

import enum


class Level(enum.IntEnum):
    """How much is said."""

    NONE = 0
    SHORT = 1
    DETAIL = 2


_level = Level.SHORT


def get() -> Level:
    """The level in force."""
    return _level


def set_level(level: Level) -> None:
    """Says more or less from here on."""
    global _level
    _level = level
