"""SHA-256 sums of a Hugging Face directory's tensors, computed once and kept.

Kept are those of a file of weights, in the user's cache directory, for as long as the file has
the device, inode, size and times of its content and of its entry that it had before and after it
was read. A file that changed within the last seconds before it was read is read again next time,
since it could change once more without a new time.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convert.files import Shard, Tensor
from qwen_jax import disk, reading, schema, user_cache
from qwen_jax.manifest import CheckpointError, Progress

_FORMAT = "qwen-jax sums 1"
_SETTLED_NS = 3_000_000_000  # the coarsest times of files that are in use have two seconds
_READERS = 8  # threads
_KEPT = schema.fields(
    format=schema.one_of(_FORMAT),
    state=schema.items(schema.whole(-(1 << 64), 1 << 64)),
    tensors=schema.values(schema.sha256),
)


def of(
    shards: Mapping[str, Shard],
    tensors: Mapping[str, Tensor],
    sha256: Callable[[str], str],
    progress: Progress | None = None,
) -> dict[str, str]:
    """The sums of some tensors, by name.

    Args:
        sha256: computes one by the tensor's name; called from several threads.
        progress: told of bytes read and to read; not called if all sums are kept.

    Raises:
        CheckpointError: if a file cannot be read or changes meanwhile.
    """
    found: dict[str, str] = {}
    missing: dict[str, tuple[list[Tensor], list[int]]] = {}
    began = time.time_ns()
    for file, shard in shards.items():
        inside = [each for each in tensors.values() if each.shard == file]
        state = _state(shard)
        kept = _read(shard.path, state)
        if kept is None or not {each.name for each in inside} <= kept.keys():
            missing[file] = inside, state
        else:
            found |= {each.name: kept[each.name] for each in inside}
    total = sum(each.size for inside, _ in missing.values() for each in inside)
    done = 0
    pool = ThreadPoolExecutor(_READERS)
    try:
        for file, (inside, state) in missing.items():
            pending = {each: pool.submit(sha256, each.name) for each in inside}
            for each, future in pending.items():
                found[each.name] = future.result()
                done += each.size
                if progress:
                    progress(done, total)
            shard = shards[file]
            if _state(shard) == state and began - max(state[-2:]) > _SETTLED_NS:
                _write(shard.path, state, {each.name: found[each.name] for each in inside})
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _state(shard: Shard) -> list[int]:
    """Device, inode, size and times of a file, which must be as it was when it was checked."""
    try:
        status = os.stat(shard.path)
    except OSError as error:
        raise CheckpointError(f"{shard.path} cannot be read: {error.strerror}") from None
    found = [status.st_ino, status.st_size, status.st_mtime_ns]
    if tuple(found) != shard.state:
        raise CheckpointError(f"{shard.path} changed while it was read: start again")
    return [status.st_dev, *found, status.st_ctime_ns]


def _place(path: Path) -> Path | None:
    directory = user_cache.directory("sums")
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return None if directory is None else directory / f"{name}.json"


def _read(path: Path, state: list[int]) -> dict[str, str] | None:
    """The sums that were kept of a file in this state."""
    place = _place(path)
    try:
        kept = None if place is None else reading.read_json(place)
        if kept is not None:
            _KEPT("", kept)
    except ValueError:  # missing or damaged: it can be made again
        return None
    return None if kept is None or kept["state"] != state else kept["tensors"]


def _write(path: Path, state: list[int], tensors: dict[str, str]) -> None:
    place = _place(path)
    if place is not None:
        content = json.dumps({"format": _FORMAT, "state": state, "tensors": tensors})
        try:
            disk.write(place, content)
        except OSError:  # a full disk costs no more than the time
            with contextlib.suppress(OSError):
                place.unlink()
