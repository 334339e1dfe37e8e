"""Console for tables, bars and pictures."""

import sys
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console

from qwen_jax.files.reading import shown

_WHOLE = 1 << 20  # columns of what is no terminal: no line ends early


def console(*, stderr: bool = False) -> Console:
    """Returns a console that prints text unchanged, without markup, emoji or highlights.

    Lines are not wrapped if the output is not a terminal, whatever COLUMNS says.
    """
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.file.isatty():
        made.width = _WHOLE
    return made


def shorten(path: str, width: int) -> str:
    """Shortens a path by folders in its middle; the name of the file stays whole.

    Args:
        width: columns of the terminal; a name of more exceeds them.
    """
    *folders, name = path.split("/")
    if cell_len(path) <= width or not folders:
        return path
    for kept in reversed(range(len(folders))):
        ahead, behind = folders[: (kept + 1) // 2], folders[len(folders) - kept // 2 :]
        short = "/".join([*ahead, "...", *behind, name])
        if cell_len(short) <= width:
            return short
    return f".../{name}"


def print_table(rows: Sequence[tuple[str, int]], total: int, limit: int) -> None:
    """A table of tokens on stderr: per file, together, and what fits."""
    sums = [("with the question and the chat template", total), ("fits, with the answer", limit)]
    counts = ["tokens", *(f"{count:,}" for _, count in [*rows, *sums])]
    digits = max(map(len, counts))
    room = console(stderr=True).width - digits - 2
    names = ["file", *(shorten(shown(name), room) for name, _ in rows), *(text for text, _ in sums)]
    width = min(room, max(map(cell_len, names)))
    for name, count in zip(names, counts, strict=True):
        print(f"{name}{' ' * (width - cell_len(name))}  {count:>{digits}}", file=sys.stderr)
