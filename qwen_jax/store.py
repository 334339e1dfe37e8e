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

from qwen_jax import hosts
from qwen_jax.manifest import CheckpointError

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


def load(folder: Path, target: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads arrays where `target` places them; of several processes each reads what it needs.

    Raises:
        CheckpointError: if they cannot be read, or are others.
    """
    with errors(f"{folder} cannot be read"):
        found: dict[str, Any] = ocp.load(str(folder), dict(target))
    for name, expected in target.items():
        if found[name].shape != expected.shape or found[name].dtype != expected.dtype:
            raise CheckpointError(
                f"{folder}: {name} is {found[name].dtype}{found[name].shape} instead of "
                f"{expected.dtype}{expected.shape}"
            )
    return found


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
