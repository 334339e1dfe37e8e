"""An output directory that appears whole or not at all, and replaces an older one in one step.

Everything is written into a sibling, `NAME.partial`:

    checkpoint/   becomes the output
    state.json    what the caller needs to continue
    ready         once `checkpoint` is complete: its inode
    old           the replaced output, where the file system cannot exchange directories
    lock          held by the running process

Whoever is killed leaves the old output, or the new one, or (between the two renames on a
file system without exchange) both of them inside `NAME.partial`, where the next run finds them.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax import disk
from qwen_jax.manifest import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Staging:
    """The sibling of an output directory in which it is prepared; closed on leaving `with`.

    Args:
        output: the directory to make.

    Raises:
        CheckpointError: if its parent cannot be used, or another process prepares it.
    """

    def __init__(self, output: str | os.PathLike):
        self.output = Path(output).resolve()
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.directory = self.partial / "checkpoint"
        self._lock: int | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(
        self,
        state: dict[str, Any],
        *,
        overwrite: bool,
        resume: bool,
        same: Callable[[Path], bool],
        ours: Callable[[Path], bool],
    ) -> bool:
        """Make the sibling, or take up one that a stopped run has left.

        Args:
            state: identifies the work; a sibling is continued only with an equal one.
            overwrite: replace an output; restart a stopped run unless `resume` is set.
            resume: continue a stopped run, with its permission to overwrite.
            same: whether an existing output is what this run would make.
            ours: whether an existing output may be replaced.

        Returns:
            Whether the output is there already and nothing remains to be done.

        Raises:
            CheckpointError: if an output or a sibling is in the way.
        """
        with errors(self.output):
            if self.partial.exists():
                self._take_lock()
                self._recover()
            left = self._state()
            if resume and left is None and self._occupied() and same(self.output):
                if self.partial.exists():
                    self._discard()  # what was stopped right after it had published
                return True
            replace = overwrite
            if self.partial.exists():
                if not resume and not overwrite:
                    raise CheckpointError(
                        f"{self.partial} is left of a stopped run: continue it with --resume, "
                        "or start again with --overwrite"
                    )
                if resume and left is not None and left["work"] != state:
                    raise CheckpointError(
                        f"{self.partial} was made from another source or with another --dtype: "
                        "start again with --overwrite"
                    )
                replace = overwrite or (left is not None and left["replace"])
                if not resume:
                    self._discard()
            if self._occupied():
                if not replace:
                    raise CheckpointError(f"{self.output} exists: replace it with --overwrite")
                if not ours(self.output):
                    raise CheckpointError(
                        f"{self.output} is not a checkpoint and will not be replaced: "
                        "choose another path or remove it"
                    )
            self.directory.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            disk.write(self.partial / "state.json", json.dumps({"work": state, "replace": replace}))
        return False

    def publish(self) -> None:
        """Put the complete directory in place of the output, then remove the sibling.

        Raises:
            CheckpointError: if the file system refuses.
        """
        with errors(self.output):
            disk.sync(self.directory)
            disk.write(self.partial / "ready", str(self.directory.stat().st_ino))
            self._swap()
            self._discard()

    def _occupied(self) -> bool:
        """Whether something is at the output that a rename would not simply replace."""
        return self.output.exists() and not (
            self.output.is_dir() and not any(self.output.iterdir())
        )

    def _state(self) -> dict[str, Any] | None:
        """The state of a stopped run; None if it was stopped before it wrote one."""
        try:
            return json.loads((self.partial / "state.json").read_text())
        except FileNotFoundError:
            return None

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        self._lock = os.open(self.partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is writing {self.output}") from None

    def _recover(self) -> None:
        """Finish what was stopped while it published."""
        ready = self.partial / "ready"
        if not ready.exists():
            return
        inode = int(ready.read_text())
        if not (self.output.exists() and self.output.stat().st_ino == inode):
            self._swap()
        self._discard()

    def _swap(self) -> None:
        if not self._occupied():
            os.rename(self.directory, self.output)
        elif not _exchange(self.directory, self.output):
            os.rename(self.output, self.partial / "old")
            os.rename(self.directory, self.output)
        disk.sync(self.output.parent)

    def _discard(self) -> None:
        """Remove the sibling, what tells its state last."""
        for rest in sorted(self.partial.iterdir()):
            if rest.is_dir():
                shutil.rmtree(rest)
        for name in ("state.json", "ready", "lock"):
            (self.partial / name).unlink(missing_ok=True)
        shutil.rmtree(self.partial)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def check_apart(source: Path, output: Path) -> None:
    """Refuse to write a directory into its own source, or over a directory that holds it.

    Raises:
        CheckpointError: if one of two resolved paths lies in the other.
    """
    if source.is_relative_to(output) or output.is_relative_to(source):
        raise CheckpointError(f"{output} and {source} lie in one another: choose another output")


@contextlib.contextmanager
def errors(output: Path):
    """Turn errors of the operating system into a `CheckpointError` that says what to do.

    Raises:
        CheckpointError: naming the file and the reason.
    """
    try:
        yield
    except OSError as error:
        path = error.filename or output
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False if this system or file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    failed = library.renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
