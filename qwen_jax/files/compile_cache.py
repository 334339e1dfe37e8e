"""Persistent compilation cache: a crash-safe store of compiled programs for JAX.

JAX computes a program's key from the computation, the versions of jaxlib and of the device's
compiler, the devices, flags and options. A file holds the program after its SHA-256:

    ~/.cache/qwen-jax/programs/KEY.program    or where JAX_COMPILATION_CACHE_DIR says

It is written aside and renamed, so that a reader in any process finds a whole file or none.
Damaged files are deleted and compiled again; the least recently used ones make room. File errors
never reach a command: if nothing can be stored, everything is compiled as without a cache.
"""

import contextlib
import hashlib
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from qwen_jax.files import reading, user_cache

LIMIT = 4 << 30
"""Maximum bytes of stored programs; the least recently used ones are deleted first."""

_SUFFIX = ".program"
_DIGEST = 32  # bytes
_unchecked: dict[Path, int] = {}  # bytes written to a directory since its size was last looked at
_TROUBLE = "Error (reading|writing) persistent compilation cache entry"


def begin(wanted: bool = True, *, shared: bool = False) -> None:
    """Starts caching what this process compiles, unless settings or the environment forbid it.

    Args:
        wanted: False disables the cache, for reading too.
        shared: whether other processes run the same programs in lock-step. They must all hit or
            all miss, or some would wait for others that do not compile, so only a directory that
            JAX_COMPILATION_CACHE_DIR names for all of them is used.
    """
    import jax
    from jax._src import compilation_cache
    from jax._src import config as settings

    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
    elif settings.enable_compilation_cache.value and (path := _place(shared)) is not None:
        jax.config.update("jax_compilation_cache_dir", path)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        warnings.filterwarnings("ignore", _TROUBLE)
        if "://" not in path:
            compilation_cache.get_file_cache = lambda path: (_store(Path(path)), path)
    compilation_cache.reset_cache()  # jax looks at these settings once


def _place(shared: bool) -> str | None:
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given or shared:
        return given or None
    path = directory()
    return None if path is None else str(path)


def directory() -> Path | None:
    """Returns the directory of programs under the user's cache directory; None if unusable.

    Programs are code: a directory that others could write to is not used.
    """
    path = user_cache.directory("programs")
    if path is None:
        return None
    status = path.stat()
    return path if status.st_uid == os.geteuid() and not status.st_mode & 0o022 else None


def describe() -> dict[str, Any]:
    """Describes the cache for `doctor`, as a JSON object.

    Returns:
        `directory`, None if nothing is stored; `bytes` used and their `limit`, None for remote
        storage; `reason`, why this directory is used, or why nothing is stored.
    """
    from jax._src import config as settings

    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    path, size, reason = _place(shared=False), None, "the user's cache directory"
    if not settings.enable_compilation_cache.value:
        path, reason = None, "JAX_ENABLE_COMPILATION_CACHE turns it off"
    elif given:
        reason = "as JAX_COMPILATION_CACHE_DIR says"
    elif path is None:
        reason = "the user's cache directory cannot be written to, or others can write to it"
    if path is not None and "://" not in path:
        size = sum(each for _, each, _ in _files(Path(path)))
    limit = None if size is None else _limit()
    return {"directory": path, "bytes": size, "limit": limit, "reason": reason}


def _limit() -> int:
    from jax._src import config as settings

    most = settings.compilation_cache_max_size.value
    return LIMIT if most < 0 else most


def _store(path: Path):
    from jax._src.compilation_cache_interface import CacheInterface

    class Store(CacheInterface):
        """Cache in a directory, with the interface that JAX expects."""

        _path = path

        def get(self, key: str) -> bytes | None:
            return read(path / f"{key}{_SUFFIX}")

        def put(self, key: str, value: bytes) -> None:
            write(path / f"{key}{_SUFFIX}", value, limit=_limit())

    return Store()


def read(path: Path) -> bytes | None:
    """Reads what `write` stored, and marks it as used; None if missing, or damaged and deleted."""
    try:
        data = reading.read_bytes(path, limit=LIMIT)
    except reading.FileError:
        return None
    content = data[_DIGEST:]
    is_whole = hashlib.sha256(content).digest() == data[:_DIGEST]
    with contextlib.suppress(OSError):
        if is_whole:
            os.utime(path)
        else:
            path.unlink()
    return content if is_whole else None


def write(path: Path, content: bytes, *, limit: int = LIMIT) -> None:
    """Stores bytes if possible, and deletes the least recently used programs over the limit.

    A process adds up what is stored at its first call and after each 64th part of the limit.

    Args:
        limit: maximum bytes of all programs in the directory.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside, name = tempfile.mkstemp(dir=path.parent, suffix=_SUFFIX)
        try:
            with open(aside, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
        _unchecked[path.parent] = _unchecked.get(path.parent, limit) + len(content)
        if _unchecked[path.parent] <= limit // 64:
            return
        total = _unchecked[path.parent] = 0
        for _, size, each in sorted(_files(path.parent), reverse=True):
            total += size
            if total > limit:
                os.unlink(each)


def _files(directory: Path) -> list[tuple[int, int, str]]:
    """Returns time of last use in ns, bytes, and path of each program in a directory."""
    found = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(_SUFFIX):
                with contextlib.suppress(OSError):  # another process deleted it
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
    return found
