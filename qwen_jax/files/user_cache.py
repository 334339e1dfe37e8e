"""User's cache directory, for files that can be recreated."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def directory(name: str = "") -> Path | None:
    """Returns this program's directory `name` in the user's cache directory, created if missing.

    That is `$XDG_CACHE_HOME/qwen-jax/NAME`, else `~/.cache/qwen-jax/NAME`; without a name, the
    parent of all of them. Directories are created with mode 0700.

    Returns:
        The directory, or None if there is no home or it cannot be written to.
    """
    try:
        root = _root()
        path = root / name
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        usable = os.access(path, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    return path if usable else None


def found(name: str) -> Path | None:
    """Returns an existing file or directory of this name in the cache, writable or not, or None."""
    try:
        path = _root() / name
    except RuntimeError:
        return None
    return path if os.path.exists(path) else None


def temporary() -> Path:
    """Returns a directory for temporary files that only this user can write, the same each run.

    That is `qwen-jax-UID`, created if missing, or a new directory if others can write to that.

    Raises:
        OSError: if no directory can be created.
    """
    path = Path(tempfile.gettempdir()) / f"qwen-jax-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o22:
        return path
    return Path(tempfile.mkdtemp(prefix="qwen-jax-"))


def _root() -> Path:
    """Returns the root of the cache; raises RuntimeError if there is no home directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "qwen-jax"
