"""Arrays on disk as Orbax checkpoints: storage settings, and readable errors."""

import asyncio
import contextlib
import gc
import glob
import logging
import os
import re
import shutil
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src import asyncio_utils

from qwen_jax.distributed import multihost
from qwen_jax.distributed.jax_settings import own_settings
from qwen_jax.files.reading import printable, shown
from qwen_jax.storage import atomic
from qwen_jax.storage.manifest import CheckpointError, File, file_sums

_CHUNK_BYTES = 64 << 20  # the least that a device reads at once
_REMOTE = re.compile(r"/(gs|s3|az|hf)/|.*gs:/")  # what Orbax takes for a bucket
# Parts of the paths of what Orbax writes, also while it writes.
_WRITTEN = re.compile(
    r"(_CHECKPOINT_METADATA|_METADATA|_sharding|_strings\.json|orbax\.checkpoint|commit_success\.txt"
    r"|state|d|[0-9a-f]{32}|(ocdbt\.)?process_\d+|manifest\.ocdbt|array_metadatas)"
    r"(\.orbax-[\w.-]+|\.__lock\w*)?"
)


def wrote(name: str) -> bool:
    """Returns True if Orbax gives this path to a file inside a folder of arrays.

    Args:
        name: path relative to the folder, with slashes.
    """
    return all(_WRITTEN.fullmatch(each) for each in name.split("/"))


def check_path(folder: Path) -> None:
    """Checks, before anything is computed, that arrays can be stored in a directory.

    Raises:
        CheckpointError: if Orbax would look for it elsewhere, or cannot name it.
    """
    path = str(folder.absolute())
    if _REMOTE.match(f"{path}/"):
        raise CheckpointError(f"{shown(folder)} reads as a path of remote storage: name another")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{shown(folder)} is not UTF-8: name another directory") from None


def save(folder: Path, arrays: dict[str, Any], *, alone: bool = False) -> None:
    """Writes arrays into a folder of their own; in a job each process writes its shards.

    Leftovers of an interrupted attempt are removed first. The names, shapes and dtypes are read
    back before this returns, see `check`.

    Args:
        arrays: nested dicts of JAX or NumPy arrays.
        alone: only this process of a job calls this.

    Raises:
        CheckpointError: if they cannot be written or found again.
    """

    def clear() -> None:
        for rest in (folder, *folder.parent.glob(f"{glob.escape(folder.name)}.*")):
            if rest.exists():
                shutil.rmtree(rest)

    with errors(f"{shown(folder)} cannot be written"):
        clear() if alone else multihost.broadcast_json(clear)
        ocp.save(str(folder), arrays)
    check(folder, arrays)


def check(folder: Path, expected: dict[str, Any]) -> None:
    """Checks that a folder holds exactly the expected arrays; reads only their metadata.

    Args:
        expected: nested dicts of leaves with a shape and a dtype.

    Raises:
        CheckpointError: naming the first array that differs.
    """
    with errors(f"{shown(folder)} cannot be read"):
        found = dict(_arrays(ocp.metadata(str(folder)).metadata))
    for name, leaf in _arrays(expected):
        if name not in found:
            raise CheckpointError(f"{shown(folder)} holds no array {name} that can be read")
        there, shape = found.pop(name), tuple(leaf.shape)
        if tuple(there.shape) != shape or there.dtype != leaf.dtype:
            raise CheckpointError(
                f"{shown(folder)}: {name} is {there.dtype}{tuple(there.shape)} instead of "
                f"{leaf.dtype}{shape}"
            )
    for name in found:
        raise CheckpointError(f"{shown(folder)} holds an unknown array {printable(name)}")


def load(folder: Path, target: dict[str, Any]) -> dict[str, Any]:
    """Reads arrays; in a job each process reads the shards of its devices.

    Args:
        target: nested dicts of `jax.ShapeDtypeStruct` with a sharding, or of NumPy arrays for
            arrays on the host.

    Raises:
        CheckpointError: if they cannot be read, or differ in name, shape or dtype.
    """
    check(folder, target)
    with errors(f"{shown(folder)} cannot be read"):
        return ocp.load(str(folder), target)


def _arrays(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields the arrays of a tree with their names, keys joined by dots."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def flush(folder: Path, root: Path) -> dict[str, File]:
    """Flushes a folder to disk; returns sizes and checksums of its files by path from `root`.

    Raises:
        OSError: if the disk fails.
    """
    inside = sorted(folder.rglob("*"))
    for path in (*inside, folder, folder.parent):
        atomic.sync(path)
    return {path.relative_to(root).as_posix(): file_sums(path) for path in inside if path.is_file()}


@contextlib.contextmanager
def errors(doing: str) -> Iterator[None]:
    """Sets Orbax's storage options, and turns its errors into `CheckpointError` without its logs.

    All reads and writes of Orbax have ended on exit, even after an error.

    Args:
        doing: text that errors begin with.

    Raises:
        CheckpointError: with `doing`, then the operating system's reason if there is one.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False  # floats do not shrink, but take thrice as long
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.file.path_class = _Path
    logger = logging.getLogger("absl")
    level = logger.level
    policy = asyncio.get_event_loop_policy()
    inner = getattr(asyncio_utils, "uvloop", None)
    logger.setLevel(logging.CRITICAL)
    asyncio.set_event_loop_policy(_Policy())
    asyncio_utils.uvloop = asyncio  # what makes Orbax's loops inside loops
    try:
        with context, own_settings():
            yield
    except Exception as error:  # Orbax raises Exception itself too
        if isinstance(error, RuntimeError):
            multihost.await_verdict()  # another process may have died, for which Orbax waits
        _drop_unbegun(error)
        raise CheckpointError(f"{doing}: {_reason(error)}") from None
    finally:
        asyncio_utils.uvloop = inner
        asyncio.set_event_loop_policy(policy)
        logger.setLevel(level)


def _drop_unbegun(error: BaseException) -> None:
    """Drops coroutines that were never awaited because of an error, without Python's warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        gc.collect()


def _reason(error: BaseException) -> str:
    """Returns the operating system's reason for an error or its causes, else its first line."""
    cause: BaseException | None = error
    while cause is not None:
        code = re.search(r"os_error_code='(\d+)'", str(cause))
        if code:
            return os.strerror(int(code[1]))
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__
    return printable(str(error).partition("\n")[0]) or type(error).__name__


class _Path(type(epath.Path("/"))):
    """A path whose `glob` does not treat `[`, `*` and `?` of the path itself as a pattern."""

    def glob(self, pattern: str) -> Iterator["_Path"]:
        return (self / name for name in glob.glob(pattern, root_dir=self))


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that waits for all its tasks before it closes.

    Orbax closes its loops at the first error, while other reads and writes are running.
    TensorStore would then find no loop to report them to, and print a traceback for each.
    """

    def close(self) -> None:
        if self.is_closed():
            return
        if tasks := asyncio.all_tasks(self):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.run_until_complete(self.shutdown_default_executor())
        super().close()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Ignores further errors beside the first one, which Orbax raises."""


class _Policy(asyncio.DefaultEventLoopPolicy):
    _loop_factory = _Loop
