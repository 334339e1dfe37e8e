"""SHA-256 sums of weight files and their tensors, computed once and cached.

The sums of a file and of its tensors are stored in the user's cache directory, and valid while
the file has the device, inode, size, mtime and ctime that it had before and
after it was read. A file that changed within the last seconds before it was read is read again
next time, since it could change once more without a new time.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from convert.files import Shard, Tensor
from qwen_jax.files import reading, schema, user_cache
from qwen_jax.storage import atomic
from qwen_jax.storage.manifest import CheckpointError, Manifest, Progress, counter, file_sums

_FORMAT = "qwen-jax sums 1"
SETTLED_NS = 3_000_000_000  # the coarsest times of files that are in use have two seconds
_READERS = 8  # threads
_SMALL_BYTES = 1 << 20  # of a file that is read each time


class _Kept(schema.Record, frozen=True):
    """The content of a file that keeps the sums of another."""

    format: Literal["qwen-jax sums 1"]
    state: list[int]
    tensors: dict[str, schema.Sha256]


def of(
    shards: Mapping[str, Shard],
    tensors: Mapping[str, Tensor],
    sha256: Callable[[str], str],
    progress: Progress | None = None,
) -> dict[str, str]:
    """Return the sums of tensors, by name.

    Args:
        shards: files of the tensors, by name.
        tensors: tensors by name.
        sha256: computes the sum of a tensor by name; called from several threads.
        progress: called with bytes read and bytes in all; not called if all sums are cached.

    Raises:
        CheckpointError: if a file cannot be read or changes meanwhile.
    """
    found: dict[str, str] = {}
    missing: dict[str, tuple[list[Tensor], list[int]]] = {}
    began = time.time_ns()
    for file, shard in shards.items():
        inside = [each for each in tensors.values() if each.shard == file]
        state = _state(shard.path, shard.state)
        kept = _read(shard.path, state)
        if kept is None or not {each.name for each in inside} <= kept.keys():
            missing[file] = inside, state
        else:
            found |= {each.name: kept[each.name] for each in inside}
    on_bytes = counter(progress, sum(e.size for inside, _ in missing.values() for e in inside))
    pool = ThreadPoolExecutor(_READERS)
    try:
        for file, (inside, state) in missing.items():
            pending = {each: pool.submit(sha256, each.name) for each in inside}
            for each, future in pending.items():
                found[each.name] = future.result()
                on_bytes(each.size)
            shard = shards[file]
            if _state(shard.path, shard.state) == state:
                _write(shard.path, state, began, {each.name: found[each.name] for each in inside})
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def check_parameters(directory: Path, manifest: Manifest, progress: Progress | None = None) -> None:
    """Compare every byte of a converted checkpoint's parameters with the manifest's sums.

    Args:
        progress: called with bytes read and bytes in all; not called if all sums are cached.

    Raises:
        CheckpointError: naming the file that cannot be read, changes meanwhile or differs.
    """
    began = time.time_ns()
    missing: dict[str, list[int]] = {}
    for name, expected in manifest.files.items():
        if name.startswith("params/"):
            state = _state(directory / name)
            if _read((directory / name).resolve(), state) != {"": expected.sha256}:
                missing[name] = state
    on_bytes = counter(progress, sum(state[2] for state in missing.values()))
    pool = ThreadPoolExecutor(_READERS)
    try:
        pending = {name: pool.submit(file_sums, directory / name) for name in missing}
        for name, future in pending.items():
            path, expected = directory / name, manifest.files[name]
            try:
                found = future.result()
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
            if found != expected:
                raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's")
            if _state(path) != missing[name]:
                raise CheckpointError(f"{path} changed while it was read: start again")
            if found.size > _SMALL_BYTES:
                _write(path.resolve(), missing[name], began, {"": found.sha256})
            on_bytes(found.size)
    finally:
        pool.shutdown(cancel_futures=True)


def _state(path: Path, expected: tuple[int, ...] | None = None) -> list[int]:
    """Return device, inode, size and times of a file.

    Raises:
        CheckpointError: if it cannot be read, or has changed since it was checked.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    found = [status.st_ino, status.st_size, status.st_mtime_ns]
    if expected not in (None, tuple(found)):
        raise CheckpointError(f"{path} changed while it was read: start again")
    return [status.st_dev, *found, status.st_ctime_ns]


def _place(path: Path) -> Path | None:
    directory = user_cache.directory("sums")
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return None if directory is None else directory / f"{name}.json"


def _read(path: Path, state: list[int]) -> dict[str, str] | None:
    """Read the cached sums of a file in this state; None if there are none."""
    place = _place(path)
    try:
        kept = None if place is None else schema.read(reading.read_json(place), _Kept)
    except ValueError:  # missing or damaged: it can be made again
        return None
    return None if kept is None or kept.state != state else kept.tensors


def _write(path: Path, state: list[int], began: int, tensors: dict[str, str]) -> None:
    """Cache the sums of a file, unless it changed just before reading `began`, in ns."""
    place = _place(path)
    if place is not None and began - max(state[-2:]) > SETTLED_NS:
        content = json.dumps({"format": _FORMAT, "state": state, "tensors": tensors})
        try:
            atomic.write(place, content)
        except OSError:  # a full disk costs no more than the time
            with contextlib.suppress(OSError):
                place.unlink()
