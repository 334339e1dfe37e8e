"""Verbosity: how much a command prints to stderr beside errors, one level per process."""

import enum


class Level(enum.IntEnum):
    """Verbosity levels, in ascending order."""

    NONE = 0
    SHORT = 1
    DETAIL = 2


_level = Level.SHORT


def get() -> Level:
    """Returns the current level."""
    return _level


def set_level(level: Level) -> None:
    """Sets the level of this process."""
    global _level
    _level = level
