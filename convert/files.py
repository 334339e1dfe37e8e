"""Files that nobody vouches for: which may be opened, and what their headers say."""

import dataclasses
import json
import os
import re
import stat
from pathlib import Path

from safetensors import SafetensorError, safe_open

from convert import names
from qwen_jax.manifest import CheckpointError

CHUNK_BYTES = 16 << 20  # read at once

_DTYPES = {"BF16": "bfloat16", "F32": "float32"}
_JSON_BYTES = 16 << 20  # 100 times the header of the largest model; Python needs 30 times as much


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        dtype: "bfloat16" or "float32".
        start: of its bytes in the file.
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
        path: of the file itself, links resolved.
        state: inode, size and modification time, by which a change is noticed.
        header: its JSON header, padding included.
    """

    file: str
    path: Path
    state: tuple[int, ...]
    header: bytes
    tensors: tuple[Tensor, ...]


def regular_file(root: Path, name: str) -> Path:
    """The regular file `root/name`, links resolved; it is not opened.

    A link may lead to a file of the directory or, if the directory is a snapshot of a
    Hugging Face cache, to one of the repository's blobs.

    Raises:
        CheckpointError: if it is missing, not a regular file or links elsewhere.
    """
    path = root / name
    try:
        target = path.resolve(strict=True)
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    repository = root.parent.parent
    snapshot = root.parent.name == "snapshots" and repository.name.startswith("models--")
    if target.parent != root and not (snapshot and target.parent == repository / "blobs"):
        raise CheckpointError(f"{path} is a link to {target}: copy the file into the directory")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file")
    return target


def open_file(path: Path):
    """A checked file; it must not have become a link or a pipe since."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    return open(descriptor, "rb", buffering=0)


def file_state(descriptor: int) -> tuple[int, ...]:
    """Inode, size and modification time of an open file."""
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_index(root: Path, name: str, pattern: re.Pattern) -> dict[str, str]:
    """The `weight_map` of an index: from tensor to file, whose names match `pattern`.

    Raises:
        CheckpointError: if it is malformed or a file name could lead out of the directory.
    """
    path = root / name
    target = regular_file(root, name)
    if target.stat().st_size > _JSON_BYTES:
        raise CheckpointError(f"{path} is longer than {_JSON_BYTES} bytes")
    try:
        with open_file(target) as file:
            index = json.loads(file.read().decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {printable(error)}") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path} has no weight_map")
    for tensor, file in files.items():
        if not isinstance(file, str) or not pattern.fullmatch(file):
            raise CheckpointError(
                f"{path}: {printable(tensor)} is in {printable(file)}, which is no file name"
            )
    return files


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def read_shard(root: Path, file: str) -> Shard:
    """A file whose header safetensors and this module read alike.

    Raises:
        CheckpointError: naming the file, and the tensor if there is one.
    """
    path = root / file
    target = regular_file(root, file)
    try:
        with open_file(target) as opened:
            state = file_state(opened.fileno())
            length = int.from_bytes(opened.read(8), "little")
            if state[1] < 8 or length > min(state[1] - 8, _JSON_BYTES):
                raise CheckpointError(
                    f"{path} is cut short or no safetensors file: its header takes {length} bytes"
                )
            header = opened.read(length)
        with safe_open(target, framework="numpy") as checked:
            slices = {name: checked.get_slice(name) for name in checked.keys()}  # noqa: SIM118
            seen = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no valid safetensors file: {printable(error)}") from None
    try:
        body = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
        body.pop("__metadata__", None)
        rows = {
            name: (row["dtype"], tuple(row["shape"]), *row["data_offsets"])
            for name, row in body.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed header: {printable(error)}") from None
    if {name: row[:2] for name, row in rows.items()} != seen:
        raise CheckpointError(f"{path} has an ambiguous header")
    for name, (dtype, *_) in rows.items():
        if dtype not in _DTYPES and not names.DROPPED.fullmatch(name):
            raise CheckpointError(
                f"{path}: {printable(name)} is of type {printable(dtype)}: "
                "only BF16 and F32 weights can be used"
            )
    tensors = (
        Tensor(
            name=name,
            shard=file,
            dtype=_DTYPES.get(str(dtype), str(dtype)),
            shape=shape,
            start=8 + length + begin,
            size=end - begin,
        )
        for name, (dtype, shape, begin, end) in rows.items()
    )
    return Shard(
        file=file,
        path=target,
        state=state,
        header=header,
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.start)),
    )


def same_bytes(shards: dict[str, Shard], one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
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
        raise CheckpointError(f"{one.shard}: {one.name} cannot be read: {error.strerror}") from None
    return True


def printable(text: object) -> str:
    """Text from a file that nobody checked, fit for one line of a terminal."""
    text = str(text)
    return (text if text.isprintable() else repr(text))[:200]
