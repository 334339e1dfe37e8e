"""Atomic writes: a file is replaced as a whole or not at all, and is durable afterwards."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.files.reading import FileError, kind_of, shown

_DESCRIPTORS = re.compile(r"/proc/\d+(/task/\d+)?/fd")


def is_stream(path: Path) -> bool:
    """Returns True for what cannot be replaced: a pipe, character device or open descriptor.

    Descriptors are `/dev/stdout` and all others under `/proc`, whatever they are open on.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or _descriptor(path) is not None


def _descriptor(path: Path) -> str | None:
    """Follows links to a descriptor of a process, such as `/proc/7/fd/1`; None if it is none."""
    while path.is_symlink():
        folder = os.path.realpath(path.parent)
        if _DESCRIPTORS.fullmatch(folder):
            return f"{folder}/{path.name}"
        path = path.parent / os.readlink(path)
    return None


def prepare(path: Path, error: type[ValueError] = FileError, *, streams: bool = False) -> None:
    """Checks, before long work, that a file can be written; creates its parent directories.

    Args:
        error: exception type raised instead of `FileError`.
        streams: also allow paths for which `is_stream` is true.

    Raises:
        FileError: if there is a directory, a pipe or a device of that name.
        OSError: if a directory cannot be created or nothing can be written there.
    """
    if is_stream(path):
        if not streams:
            kind = kind_of(path.stat().st_mode)
            what = "an open descriptor" if kind == "a regular file" else kind
            raise error(f"{shown(path)} is {what}: name a file to write")
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "it cannot be written", str(path))
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as found:
        raise NotADirectoryError(20, "it is not a directory", found.filename) from None
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        raise error(f"{shown(path)} is {kind_of(mode)}: name a file to write")
    place = path if path.exists() else path.parent
    if not os.access(place, os.W_OK):
        raise PermissionError(13, "it cannot be written", str(place))


def write(path: Path, content: str | bytes, *, streams: bool = False) -> None:
    """Replaces a file atomically; the new content is on disk when this returns.

    It is first written to `NAME.partial` in the same directory, or to a name with eight more
    hexadecimal digits if that exists.

    Args:
        streams: write into a path for which `is_stream` is true instead of replacing it.

    Raises:
        OSError: if it cannot be written; an earlier file is unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    if streams and is_stream(path):
        _write_through(path, data)
        return
    partial = path.with_name(f"{path.name}.partial")
    if os.path.lexists(partial):
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    with naming(path):
        file = partial.open("xb")  # not removed if another process has made it
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    sync(path.parent)


def _write_through(path: Path, data: bytes) -> None:
    """Writes into a pipe, a device or an open descriptor; blocks until a reader opens a pipe."""
    folder, _, number = (_descriptor(path) or "").rpartition("/")
    own = folder == os.path.realpath("/proc/self/fd")
    with naming(path):
        if own and sys.stdout is not None:
            sys.stdout.flush()  # what was printed before comes first
        # A file opened anew would be written from its beginning.
        descriptor = os.dup(int(number)) if own else os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        with open(descriptor, "wb") as file:
            file.write(data)


def check_ours(path: Path, is_ours: Callable[[Path], bool], *, streams: bool = False) -> None:
    """Refuses to replace a file that this program did not write.

    Args:
        is_ours: returns True if a regular file carries this program's mark.
        streams: allow paths for which `is_stream` is true, which are never replaced.

    Raises:
        FileExistsError: naming the file and the remedy.
        OSError: if it cannot be read.
    """
    if streams and is_stream(path):
        return
    if os.path.lexists(path) and not (path.is_file() and is_ours(path)):
        problem = "exists and was not written by this command: name another file, or remove it"
        raise FileExistsError(errno.EEXIST, problem, str(path))


def lock(path: Path, busy: ValueError) -> int:
    """The descriptor of a file, made if missing, that no other process locks until it is closed.

    Raises:
        ValueError: `busy`, if another process has locked it.
        OSError: if it cannot be opened or locked, or is a link.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(path, flags, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise busy if isinstance(error, BlockingIOError) else error from None
    return file


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to disk (fsync)."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file name to an OSError raised within it, if it lacks one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
