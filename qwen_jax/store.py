"""Arrays on disk, as Orbax checkpoints: its settings here, and its errors as sentences."""

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from qwen_jax import disk, hosts
from qwen_jax.manifest import CheckpointError, File, file_sums

_CHUNK_BYTES = 64 << 20  # the least that a device reads at once


def save(folder: Path, arrays: dict[str, jax.Array]) -> None:
    """Writes arrays into a folder of their own; of several processes each writes what it holds.

    What an interrupted attempt has left there is removed first.

    Raises:
        CheckpointError: if they cannot be written.
    """

    def clear() -> None:
        for rest in (folder, *folder.parent.glob(f"{folder.name}.*")):
            if rest.exists():
                shutil.rmtree(rest)

    with errors(f"{folder} cannot be written"):
        hosts.shared(clear)
        ocp.save(str(folder), arrays)


def load(folder: Path, target: dict[str, Any]) -> dict[str, Any]:
    """Reads arrays as `target` says; of several processes each reads what it needs.

    Args:
        target: nested dicts of `jax.ShapeDtypeStruct` with a placement, or of numpy arrays for
            the host.

    Raises:
        CheckpointError: if they cannot be read, or are others.
    """
    with errors(f"{folder} cannot be read"):
        found: dict[str, Any] = ocp.load(str(folder), target)
    expected = jax.tree_util.tree_leaves_with_path(target)
    for (path, leaf), actual in zip(expected, jax.tree.leaves(found), strict=True):
        if actual.shape != leaf.shape or actual.dtype != leaf.dtype:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise CheckpointError(
                f"{folder}: {name} is {actual.dtype}{actual.shape} instead of "
                f"{leaf.dtype}{leaf.shape}"
            )
    return found


def flush(folder: Path, root: Path) -> dict[str, File]:
    """Flushes a folder to the disk; sizes and checksums of its files, by path from `root` on.

    Raises:
        OSError: if the disk fails.
    """
    inside = sorted(folder.rglob("*"))
    for path in (*inside, folder, folder.parent):
        disk.sync(path)
    return {path.relative_to(root).as_posix(): file_sums(path) for path in inside if path.is_file()}


@contextlib.contextmanager
def errors(doing: str):
    """Storage options of our files; errors become a `CheckpointError`, without Orbax's log of them.

    Raises:
        CheckpointError: with `doing`, then the operating system's reason where there is one.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False  # floats do not shrink, but take thrice as long
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with context:
            yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            hosts.await_verdict()  # another process may have died, for which Orbax waits
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code:
            reason = os.strerror(int(code[1]))
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{doing}: {reason}") from None
    finally:
        logger.setLevel(level)
