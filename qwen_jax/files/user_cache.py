"""Where things are kept that can be made again: under the user's cache directory."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def directory(name: str = "") -> Path | None:
    """The directory `name` of this program under the user's cache directory, made if missing.

    That is `$XDG_CACHE_HOME/qwen-jax/NAME`, else `~/.cache/qwen-jax/NAME`; without a name, what
    holds them all. What is made is readable by its owner alone (mode 0700).

    Returns:
        None if there is no home or nothing can be written there: callers do without.
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
    """What is there of this name already, whether or not anything can be written there."""
    try:
        path = _root() / name
    except RuntimeError:
        return None
    return path if os.path.exists(path) else None


def temporary() -> Path:
    """A directory for temporary files that this user alone can write, the same in every run.

    That is `qwen-jax-UID`, made if missing, or a new one where others can write into it.

    Raises:
        OSError: if nothing can be written anywhere.
    """
    path = Path(tempfile.gettempdir()) / f"qwen-jax-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o22:
        return path
    return Path(tempfile.mkdtemp(prefix="qwen-jax-"))


def _root() -> Path:
    """Raises RuntimeError where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "qwen-jax"
