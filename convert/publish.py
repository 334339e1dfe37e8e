"""Atomic publication: an output directory appears as a whole, and replaces an older one at once.

Everything is written into a sibling, `NAME.partial`:

    checkpoint/   becomes the output
    parts/        what the caller needs to resume
    state.json    identifies the work, and this directory as written by this program
    ready         once `checkpoint` is complete: its inode
    old           the replaced output
    lock          held by the running process

Only files that were written here are removed: an output is replaced if its caller finds nothing
else in it, both before the work and right before the exchange, and a sibling without such a
state.json is left alone.

A killed run leaves the old output, or the new one, or (between the two renames on a
file system without exchange) both of them inside `NAME.partial`, where the next run finds them.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from qwen_jax.files import reading, schema
from qwen_jax.files.reading import shown
from qwen_jax.storage import atomic
from qwen_jax.storage.manifest import CheckpointError, File, file_sums

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FORMAT = "qwen-jax staging 1"
_STATE_BYTES = 1 << 20
_OURS = re.compile(
    r"checkpoint|parts|old|lock|(state\.json|ready|mark)((\.[0-9a-f]{8})?\.partial)?"
)
_PARTS = re.compile(r"[\w.-]+\.json(\.[0-9a-f]{8})?(\.partial)?")
_BEFORE_STATE = re.compile(r"checkpoint|lock|ready|state\.json(\.[0-9a-f]{8})?\.partial")


class _State(schema.Record, frozen=True):
    """The content of state.json."""

    format: Literal["qwen-jax staging 1"]
    work: dict[str, str]
    replace: bool


def place(output: str | os.PathLike) -> Path:
    """Resolve the path of an output.

    Raises:
        CheckpointError: if it is a pipe, a device or an open descriptor.
    """
    if atomic.is_stream(Path(output)):
        raise CheckpointError(f"{shown(output)} is no place for a directory: name another path")
    return Path(output).resolve()


class Staging:
    """The sibling of an output directory in which it is prepared; closed on leaving `with`.

    Args:
        output: directory to create.

    Raises:
        CheckpointError: if its parent cannot be used, or another process prepares it.
    """

    def __init__(self, output: str | os.PathLike):
        self.output = Path(output).resolve()
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.directory = self.partial / "checkpoint"
        self._lock: int | None = None
        self._replace = False
        self._check_ours: Callable[[Path], None] = lambda _: None
        self._writes: Callable[[str], bool] = lambda _: False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self, *, overwrite: bool, check_ours: Callable[[Path], None]) -> None:
        """Check, before any work, that nothing is in the way of a new run.

        Raises:
            CheckpointError: as `begin`.
        """
        with errors(self.output):
            left = self._left() is not None and not (self.partial / "ready").exists()
            if left and not overwrite:
                raise CheckpointError(self._stopped())
            self._check_ours, self._replace = check_ours, overwrite
            self._check_output()

    def _stopped(self) -> str:
        return (
            f"{shown(self.partial)} is left of a stopped run: continue it with --resume, or start "
            "again with --overwrite"
        )

    def begin(
        self,
        state: dict[str, str],
        *,
        overwrite: bool,
        resume: bool,
        same: Callable[[Path], bool],
        check_ours: Callable[[Path], None],
        writes: Callable[[str], bool],
    ) -> bool:
        """Create the sibling, or resume one that a stopped run has left.

        Args:
            state: identifies the work; a sibling is resumed only with an equal one.
            overwrite: replace an output; restart a stopped run unless `resume` is set.
            resume: resume a stopped run, with its permission to overwrite.
            same: returns True if an existing output is what this run would write.
            check_ours: raises CheckpointError if an existing output holds foreign files.
            writes: returns True if such runs write a file of this path, relative to the output.

        Returns:
            True if the output exists already and nothing remains to be done.

        Raises:
            CheckpointError: if an output or a sibling is in the way.
        """
        self._check_ours, self._writes = check_ours, writes
        with errors(self.output):
            left = self._left()
            if self.partial.exists():
                self._take_lock()
                self._replace = left is not None and left["replace"]
                self._recover()
                left = self._left()
            if resume and left is None and self._occupied() and same(self.output):
                if self.partial.exists():
                    self._discard()  # what was stopped right after it had published
                return True
            self._replace = overwrite
            if self.partial.exists():
                if not resume and not overwrite:
                    raise CheckpointError(self._stopped())
                if resume and left is not None and left["work"] != state:
                    raise CheckpointError(
                        f"{shown(self.partial)} was made from another source or with another "
                        "--dtype: start again with --overwrite"
                    )
                self._replace = overwrite or (left is not None and left["replace"])
                if not resume:
                    self._discard()
            self._check_output()
            self.directory.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            atomic.write(
                self.partial / "state.json",
                json.dumps({"format": _FORMAT, "work": state, "replace": self._replace}),
            )
        return False

    def publish(self) -> None:
        """Replace the output by the complete directory, then remove the sibling.

        Raises:
            CheckpointError: if the file system refuses.
        """
        with errors(self.output):
            atomic.sync(self.directory)
            self._check_output()
            atomic.write(self.partial / "ready", str(self.directory.stat().st_ino))
            self._swap()
            self._discard()

    def _occupied(self) -> bool:
        """Return True if the output exists and is not an empty directory."""
        return self.output.exists() and not (
            self.output.is_dir() and not any(self.output.iterdir())
        )

    def _check_output(self) -> None:
        """Refuse to replace an output without permission, or one with foreign files.

        Raises:
            CheckpointError: naming it, or the file in it.
        """
        if not self._occupied():
            return
        name = shown(self.output)
        if not self._replace:
            raise CheckpointError(f"{name} exists: replace it with --overwrite")
        try:
            self._check_ours(self.output)
        except CheckpointError as error:
            raise CheckpointError(
                f"{name} will not be replaced: {error}; move what is yours away, or choose "
                "another path"
            ) from None

    def _left(self) -> dict[str, Any] | None:
        """Read the state of a stopped run; None if it was stopped before it wrote one.

        Raises:
            CheckpointError: if the sibling was not written by this program.
        """
        if not os.path.lexists(self.partial):
            return None
        name = shown(self.partial)
        if self.partial.is_symlink() or not self.partial.is_dir():
            raise CheckpointError(f"{name} is in the way: move it away or choose another path")
        path = self.partial / "state.json"
        known, left = _BEFORE_STATE, None
        if os.path.lexists(path):
            try:
                left = reading.read_json(path, limit=_STATE_BYTES, error=schema.SchemaError)
                schema.read(left, _State)
            except schema.SchemaError as error:
                raise CheckpointError(f"{shown(path)}: {error}: move {name} away") from None
            known = _OURS
        for each in sorted(self.partial.iterdir()):
            foreign = None if known.fullmatch(each.name) else each
            if foreign is None and left is None and not _is_left_of_ours(each):
                foreign = each
            foreign = foreign or self._foreign_in(each)
            if foreign is not None:
                inside = foreign.relative_to(self.partial)
                raise CheckpointError(
                    f"{name} is in the way, and {shown(inside)} in it is no part of a stopped "
                    "run: move it away or choose another path"
                )
        return left

    def _foreign_in(self, folder: Path) -> Path | None:
        """Return a file in a part of the sibling that no run has written; None if there is none."""
        if folder.is_symlink() or not folder.is_dir():
            return None
        writes = _PARTS.fullmatch if folder.name == "parts" else self._writes
        for path in sorted(folder.rglob("*")):
            ours = writes(path.relative_to(folder).as_posix())
            if not ours and (path.is_symlink() or not path.is_dir()):
                return path
        return None

    def _take_lock(self) -> None:
        if self._lock is None:
            busy = CheckpointError(f"another process is writing {self.output}")
            self._lock = atomic.lock(self.partial / "lock", busy)

    def _recover(self) -> None:
        """Finish a publication that was stopped midway."""
        ready = self.partial / "ready"
        if not ready.exists():
            return
        inode = reading.read_text(ready, limit=64, error=CheckpointError)
        published = self.output.exists() and str(self.output.stat().st_ino) == inode
        if not published and self.directory.exists():
            self._check_output()
            self._swap()
        self._discard()

    def _swap(self) -> None:
        if not self._occupied():
            os.rename(self.directory, self.output)
        elif exchange(self.directory, self.output):
            os.rename(self.directory, self.partial / "old")
        else:
            os.rename(self.output, self.partial / "old")
            os.rename(self.directory, self.output)
        atomic.sync(self.output.parent)

    def _discard(self) -> None:
        """Remove the sibling, its state.json last."""
        last = ("state.json", "ready", "lock")
        for rest in sorted(self.partial.iterdir()):
            if rest.is_dir() and not rest.is_symlink():
                shutil.rmtree(rest)
            elif rest.name not in last:
                rest.unlink()
        for name in last:
            (self.partial / name).unlink(missing_ok=True)
        self.partial.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _is_left_of_ours(path: Path) -> bool:
    """Return True if a stopped run may have left this part of a sibling without a state."""
    if path.is_symlink() or not path.is_file():
        return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if path.name == "lock":
        return not path.stat().st_size
    if path.name == "ready":  # the number of an inode
        return path.stat().st_size <= 20 and (path.read_text() or "0").isdigit()
    return True  # a state that was not written to its end


def check_written(
    directory: Path, files: Mapping[str, File], manifest: str, *, by_name: str | None = None
) -> None:
    """Check that a directory holds only the files that were written, with the same bytes.

    Args:
        files: sizes and checksums of the files that were written, by path.
        manifest: name of the file that lists them.
        by_name: prefix of paths that are accepted by name; the bytes of other files are compared.

    Raises:
        CheckpointError: naming the file.
    """

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(directory, onerror=fail):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for path in sorted(Path(folder) / name for name in (*names, *links)):
            name = path.relative_to(directory).as_posix()
            if name == manifest:
                continue
            if name not in files or path.is_symlink():
                raise CheckpointError(f"{shown(path)} is not in {manifest}")
            known = by_name is not None and name.startswith(by_name)
            if not known and file_sums(path) != files[name]:
                raise CheckpointError(f"{shown(path)} was changed since")


def check_apart(source: Path, output: Path) -> None:
    """Refuse to write a directory into its own source, or over a directory that holds it.

    Raises:
        CheckpointError: if one of two resolved paths lies in the other.
    """
    if source.is_relative_to(output) or output.is_relative_to(source):
        raise CheckpointError(f"{output} and {source} lie in one another: choose another output")


@contextlib.contextmanager
def errors(output: Path):
    """Turn an `OSError` into a `CheckpointError` with the remedy.

    Raises:
        CheckpointError: naming the file and the reason.
    """
    try:
        yield
    except OSError as error:
        path = error.filename or output
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directories atomically; return False if this (file) system cannot."""
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
