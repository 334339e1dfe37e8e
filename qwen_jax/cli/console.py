"""Where verbs print tables, bars and pictures."""

from rich.cells import cell_len
from rich.console import Console

_WHOLE = 1 << 20  # columns of what is no terminal: no line ends early


def console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is, without markup, emoji or highlights.

    What is no terminal gets whole lines, whatever COLUMNS says.
    """
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.file.isatty():
        made.width = _WHOLE
    return made


def shorten(path: str, width: int) -> str:
    """A path without folders in its middle, so that it fits; the name of the file stays whole.

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
