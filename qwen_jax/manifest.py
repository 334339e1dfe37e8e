"""What a converted checkpoint holds, with checksums: the file manifest.json."""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import ml_dtypes
import numpy as np

FORMAT = "qwen-jax checkpoint 1"
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}

Progress = Callable[[int, int], None]  # bytes done, bytes in all
_S = TypeVar("_S", bound="Sealed")

_CHUNK_BYTES = 16 << 20  # read and hashed at once
_SMALL_BYTES = 1 << 20  # files up to this size are hashed even by the fast check
_FILE_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text names the file and the tensor at fault."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A stored array and the Hugging Face tensor it came from.

    Attributes:
        name: of the tensor in the source.
        part: which Orbax checkpoint holds the array.
        path: keys that lead to it in the parameter tree.
        shape: of the array.
        dtype: of the array, "bfloat16" or "float32".
        source_shape: of the tensor.
        source_dtype: of the tensor.
        transposed: the array is the tensor's transpose, reshaped; else only reshaped.
        sha256: of the array's bytes, little-endian, in the layout of the tensor.
        source_sha256: of the tensor's bytes; equal to `sha256` if the dtype was kept.
    """

    name: str
    part: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    source_shape: tuple[int, ...]
    source_dtype: str
    transposed: bool
    sha256: str
    source_sha256: str

    @property
    def num_elements(self) -> int:
        """Numbers in the array."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return self.num_elements * DTYPES[self.dtype].itemsize

    def to_source(self, array: np.ndarray) -> np.ndarray:
        """The array in the layout of the source."""
        if self.transposed:
            return transpose(array.reshape(self.source_shape[::-1]))
        return array.reshape(self.source_shape)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A safetensors file of the source, so that it can be written again.

    Attributes:
        file: its name.
        header: its JSON header, padding included.
    """

    file: str
    header: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """Size and checksum of a file of the checkpoint."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a converted checkpoint holds.

    Attributes:
        versions: of this package and of the libraries that wrote the files.
        dtype: "bfloat16" or "float32", or "keep" if tensors kept their own.
        num_parameters: numbers in all arrays.
        source_sha256: fingerprint of the source's configuration, headers and samples of data.
        tensors: every array.
        aliases: source tensors that repeat another one, from name to the other's name.
        dropped: source tensors that carry no weight and are not stored.
        shards: the source's files.
        files: every file of the directory but the manifest, by path.
    """

    versions: dict[str, str]
    dtype: str
    num_parameters: int
    source_sha256: str
    tensors: tuple[Tensor, ...]
    aliases: dict[str, str]
    dropped: tuple[str, ...]
    shards: tuple[Shard, ...]
    files: dict[str, File]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def by_part(self) -> dict[str, list[Tensor]]:
        """The tensors, by part."""
        grouped: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            grouped.setdefault(tensor.part, []).append(tensor)
        return grouped

    def encode(self) -> bytes:
        """The content of manifest.json, which carries its own checksum."""
        return seal(FORMAT, dataclasses.asdict(self))


def read(path: Path) -> Manifest:
    """The manifest in a file.

    Raises:
        CheckpointError: if it is missing, damaged or of another format.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: {path.parent} is not a converted checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    manifest = unseal(path, content, FORMAT, _decoded, "convert again")
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name) or ".." in name.split("/"):
            raise CheckpointError(f"{path} lists {name!r}, which is no file of a checkpoint")
    return manifest


def _decoded(body: dict[str, Any]) -> Manifest:
    """A manifest of what `Manifest.encode` wrote."""
    for row in body["tensors"]:
        row.update({key: tuple(row[key]) for key in ("path", "shape", "source_shape")})
    return Manifest(
        **{
            **body,
            "tensors": tuple(Tensor(**row) for row in body["tensors"]),
            "dropped": tuple(body["dropped"]),
            "shards": tuple(Shard(**row) for row in body["shards"]),
            "files": {name: File(**row) for name, row in body["files"].items()},
        }
    )


@runtime_checkable
class Sealed(Protocol):
    """What a JSON file with its own checksum holds."""

    def encode(self) -> bytes:
        """The content of the file, by `seal`."""
        ...


def seal(kind: str, body: dict[str, Any]) -> bytes:
    """The content of a JSON file that carries its own checksum."""
    body = {"format": kind, **body}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({"sha256": digest, **body}, indent=1).encode() + b"\n"


def unseal(
    path: Path, content: bytes, kind: str, decode: Callable[[dict[str, Any]], _S], way_out: str
) -> _S:
    """What was written into a file.

    Args:
        decode: makes it of the body given to `seal`.
        way_out: what to do if the file is damaged.

    Raises:
        CheckpointError: if the content is not, byte for byte, what is written now.
    """
    damaged = CheckpointError(f"{path} is damaged or was edited: {way_out}")
    try:
        body = json.loads(content)
        del body["sha256"]
        if body.pop("format") != kind:
            raise CheckpointError(f"{path} is not of the format {kind!r}: {way_out}")
        found = decode(body)
        whole = found.encode() == content
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise damaged from None
    if not whole:
        raise damaged
    return found


def check_files(
    directory: Path,
    manifest: Manifest,
    *,
    full: Collection[str] = (),
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Compare files with their sizes, and with their checksums if they are small.

    Args:
        full: files whose checksums are compared whatever their size.

    Raises:
        CheckpointError: naming the first file that differs, is missing or is not in the manifest.
    """
    for name, expected in manifest.files.items():
        path = directory / name
        try:
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise CheckpointError(f"{path} is missing or not a file")
            if size != expected.size:
                raise CheckpointError(f"{path} has {size} bytes instead of {expected.size}")
            if (name in full or size <= _SMALL_BYTES) and file_sums(path, on_bytes) != expected:
                raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    for path in sorted((directory / "params").rglob("*")):
        if not path.is_dir() and path.relative_to(directory).as_posix() not in manifest.files:
            raise CheckpointError(f"{path} is not in the manifest: remove it")


def file_sums(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> File:
    """Size and checksum of a file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(max(1, min(_CHUNK_BYTES, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_bytes(count)
            size += count
    return File(size=size, sha256=digest.hexdigest())


def array_sha256(array: np.ndarray) -> str:
    """Checksum of an array's bytes in C order, little-endian."""
    return hashlib.sha256(array_bytes(array).data).hexdigest()


def array_bytes(array: np.ndarray) -> np.ndarray:
    """An array's bytes in C order; a view where that is its order already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def transpose(x: np.ndarray) -> np.ndarray:
    """A contiguous copy of the transpose of a matrix."""
    out = np.empty(x.shape[::-1], x.dtype)
    for start in range(0, len(x), 128):  # rows that stay in the cache: five times faster than .T
        out[:, start : start + 128] = x[start : start + 128].T
    return out
