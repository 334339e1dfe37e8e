"""Untrusted weight files: checks of paths, indexes and safetensors headers."""

import dataclasses
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from convert import names
from qwen_jax.files import reading
from qwen_jax.files.reading import printable, shown
from qwen_jax.storage.manifest import SAFETENSORS_DTYPES, CheckpointError, header_rows

CHUNK_BYTES = 16 << 20  # read at once
HEADER_BYTES = 8 << 20
"""Maximum bytes of an index, or of all headers together: 50 times those of 80 layers."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Location of a tensor in a safetensors file.

    Attributes:
        shard: name of the file.
        dtype: a key of `manifest.DTYPES`; another one for a tensor that is dropped.
        start: offset of its bytes in the file.
        size: number of bytes.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A safetensors file whose header was checked.

    Attributes:
        path: path of the file, with links resolved.
        state: inode, size and modification time, to notice changes.
        header: JSON header, padding included.
    """

    file: str
    path: Path
    state: tuple[int, ...]
    header: bytes
    tensors: tuple[Tensor, ...]


def regular_file(root: Path, name: str) -> Path:
    """Return the path of the regular file `root/name` with links resolved, without opening it.

    A link may point to a file of the directory or, if the directory is a snapshot of a
    Hugging Face cache, to one of the repository's blobs.

    Raises:
        CheckpointError: if it is missing, not a regular file or links elsewhere.
    """
    path = root / name
    try:
        target = path.resolve(strict=True)
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{shown(path)} is missing") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(f"{shown(path)} cannot be read: {reading.reason(error)}") from None
    repository = root.parent.parent
    snapshot = root.parent.name == "snapshots" and repository.name.startswith("models--")
    if target.parent != root and not (snapshot and target.parent == repository / "blobs"):
        raise CheckpointError(
            f"{shown(path)} is a link to {shown(target)}: copy the file into the directory"
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{shown(path)} is not a regular file")
    return target


def open_file(path: Path):
    """Open a file that was checked; fail if it has become a link since."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    return open(descriptor, "rb", buffering=0)


def file_state(descriptor: int) -> tuple[int, ...]:
    """Return inode, size and modification time of an open file."""
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_index(root: Path, name: str, pattern: re.Pattern) -> dict[str, str]:
    """Read the `weight_map` of an index, from tensor to file, whose names match `pattern`.

    Raises:
        CheckpointError: if it is malformed or a file name could lead out of the directory.
    """
    path = root / name
    regular_file(root, name)
    index = reading.read_object(path, limit=HEADER_BYTES, error=CheckpointError)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{shown(path)} has no weight_map")
    if not isinstance(index.get("metadata", {}), dict):
        raise CheckpointError(f"{shown(path)}: metadata must be an object")
    for tensor, file in files.items():
        if not isinstance(file, str) or len(file) > 255 or not pattern.fullmatch(file):
            raise CheckpointError(
                f"{shown(path)}: {printable(tensor)} is in {printable(file)}, which is no file name"
            )
    return files


def read_shards(root: Path, files: Iterable[str]) -> dict[str, Shard]:
    """Read and check the headers of safetensors files; return the files by name.

    Raises:
        CheckpointError: naming the file, and the tensor if there is one; also if all headers
            together are longer than `HEADER_BYTES`.
    """
    paths = {file: regular_file(root, file) for file in files}
    lengths = {file: _header_length(root / file, path) for file, path in paths.items()}
    if sum(lengths.values()) > HEADER_BYTES:
        longest = max(lengths, key=lambda file: lengths[file])
        raise CheckpointError(
            f"{shown(root / longest)}: its header takes {lengths[longest]:,} bytes, and those of "
            f"all {len(lengths)} files may have {HEADER_BYTES:,} together"
        )
    return {file: _read_shard(root / file, path, lengths[file]) for file, path in paths.items()}


def _header_length(path: Path, target: Path) -> int:
    """Return the length of a file's header in bytes, without reading it."""
    try:
        with open_file(target) as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {reading.reason(error)}") from None
    if size < 8 or length > size - 8:
        raise CheckpointError(
            f"{shown(path)} is cut short or no safetensors file: its header takes {length} bytes"
        )
    return length


def _read_shard(path: Path, target: Path, length: int) -> Shard:
    name = shown(path)
    try:
        with open_file(target) as opened:
            state = file_state(opened.fileno())
            opened.seek(8)
            header = opened.read(length)
        with safe_open(target, framework="numpy") as checked:
            slices = {name: checked.get_slice(name) for name in checked.keys()}  # noqa: SIM118
            seen = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {reading.reason(error)}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{name} is no valid safetensors file: {printable(error)}") from None
    try:
        rows = header_rows(reading.parse_json(header))
    except ValueError as error:
        raise CheckpointError(f"{name} has a malformed header: {error}") from None
    if {tensor: (row.dtype, row.shape) for tensor, row in rows.items()} != seen:
        raise CheckpointError(f"{name} has an ambiguous header")
    for tensor, row in rows.items():
        if row.dtype not in SAFETENSORS_DTYPES and not names.DROPPED.fullmatch(tensor):
            raise CheckpointError(
                f"{name}: {printable(tensor)} is of type {printable(row.dtype)}: "
                f"only {', '.join(SAFETENSORS_DTYPES)} weights can be used"
            )
    tensors = (
        Tensor(
            name=tensor,
            shard=path.name,
            dtype=SAFETENSORS_DTYPES.get(row.dtype, row.dtype),
            shape=row.shape,
            start=8 + length + row.data_offsets[0],
            size=row.data_offsets[1] - row.data_offsets[0],
        )
        for tensor, row in rows.items()
    )
    return Shard(
        file=path.name,
        path=target,
        state=state,
        header=header,
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.start)),
    )


def same_bytes(shards: dict[str, Shard], one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors have the same dtype, shape and bytes."""
    if (one.dtype, one.shape, one.size) != (other.dtype, other.shape, other.size):
        return False
    try:
        with open_file(shards[one.shard].path) as a, open_file(shards[other.shard].path) as b:
            a.seek(one.start)
            b.seek(other.start)
            for start in range(0, one.size, CHUNK_BYTES):
                count = min(CHUNK_BYTES, one.size - start)
                if a.read(count) != b.read(count):
                    return False
    except OSError as error:
        raise CheckpointError(
            f"{one.shard}: {printable(one.name)} cannot be read: {reading.reason(error)}"
        ) from None
    return True
