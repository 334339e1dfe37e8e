"""Crash-safe JSONL: results files with one JSON object per line."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.config import ConfigError
from qwen_jax.files.reading import reason, shown
from qwen_jax.storage import atomic

CHUNK_BYTES = 1 << 20
_LINE_BYTES = 1 << 28  # far more than the longest answer
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class JournalError(ConfigError):
    """Error of a results file that cannot be read or appended to; names it and the remedy."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describes the settings that differ, as `name old -> new`; "" if none does."""
    differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in differ)


class Journal:
    """A locked file that one process at a time appends lines to.

    Lines once written are never lost: those of an `append` that waits are on disk when it
    returns, one that fails leaves the file as it was, and a process killed within it leaves
    whole lines and at most a part of one, which `repair` cuts off.

    Attributes:
        path: path of the file.
    """

    def __init__(self, path: Path):
        """Opens or creates the file and locks it.

        Raises:
            JournalError: if another process holds the lock, the file system cannot lock, or the
                path is no regular file.
            OSError: if it cannot be opened.
        """
        self.path = path
        atomic.prepare(path, JournalError)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self._size = os.fstat(self._file).st_size
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def is_empty(self) -> bool:
        return self._size == 0

    def close(self) -> None:
        """Closes the file and releases its lock; may be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def repair(self) -> None:
        """Cuts off a partial last line, as a killed run leaves it.

        Raises:
            JournalError: if it is longer than any line that is written here.
        """
        end = self._size
        with atomic.naming(self.path):
            while end:
                start = max(0, end - CHUNK_BYTES)
                newline = os.pread(self._file, end - start, start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
                if self._size - end > _LINE_BYTES:
                    raise self._too_long()
            os.ftruncate(self._file, end)
        self._size = end

    def lines(self) -> Iterator[bytes]:
        """Yields the lines of the file, without newlines.

        Raises:
            JournalError: if one is longer than any line that is written here.
        """
        with atomic.naming(self.path), self.path.open("rb") as file:
            while line := file.readline(_LINE_BYTES + 1):
                if len(line) > _LINE_BYTES:
                    raise self._too_long()
                yield line.rstrip(b"\n")

    def append(self, *records: Mapping[str, Any], wait: bool = True) -> None:
        """Appends a line for each record.

        Args:
            wait: wait until they are on disk; otherwise they survive this process, but not a
                crash of the machine.

        Raises:
            JournalError: if the disk is full or fails; the file is then as before, or ends with
                a partial line if it cannot be truncated either.
        """
        data = memoryview(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        done = 0
        try:
            os.lseek(self._file, self._size, os.SEEK_SET)
            while done < len(data):
                done += os.write(self._file, data[done:])
            if wait:
                os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            way_out = "free space" if error.errno in _FULL else "see to the disk"
            raise JournalError(
                f"{shown(self.path)}: {reason(error)}: what is in the file is whole; {way_out} and "
                "start again, finished results are not computed anew"
            ) from None
        self._size += len(data)

    def _too_long(self) -> JournalError:
        return JournalError(
            f"{shown(self.path)} has a line of over {_LINE_BYTES:,} bytes, so it is no file of "
            "results: name another one"
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(
                f"{shown(self.path)} is being written by another run: wait for it or name another "
                "file"
            ) from None
        except OSError as error:
            raise JournalError(
                f"{shown(self.path)} cannot be locked ({reason(error)}): name a file on another "
                "disk"
            ) from None


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically.

    Raises:
        JournalError: if the disk is full or fails.
    """
    try:
        atomic.write(path, json.dumps(value, indent=1) + "\n")
    except OSError as error:
        raise JournalError(f"{shown(path)}: {reason(error)}") from None
