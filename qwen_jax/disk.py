"""Files that are there whole or not at all, and stay when the machine fails."""

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Puts a file in place of what was there; it is on the disk when this returns.

    It is written beside it first, as `NAME.partial`, or under a name with eight more hexadecimal
    digits if that exists.

    Raises:
        OSError: if it cannot be written; what was there stays.
    """
    partial = path.with_name(f"{path.name}.partial")
    if os.path.lexists(partial):
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def check_ours(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Refuses to replace a file that this program did not write.

    Args:
        is_ours: whether a regular file carries what this program marks such files with.

    Raises:
        FileExistsError: naming it and the way out.
        OSError: if it cannot be read.
    """
    if os.path.lexists(path) and not (path.is_file() and is_ours(path)):
        problem = "exists and was not written by this command: name another file, or remove it"
        raise FileExistsError(errno.EEXIST, problem, str(path))


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
