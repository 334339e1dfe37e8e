"""Manifest of a converted checkpoint: its content with checksums, the file manifest.json."""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

import ml_dtypes
import msgspec
import numpy as np
from msgspec import Meta

from qwen_jax.files import reading, schema
from qwen_jax.files.reading import printable, shown
from qwen_jax.files.schema import Record, SchemaError, Sha256, Size, named
from qwen_jax.storage.errors import CheckpointError

FORMAT = "qwen-jax checkpoint 1"
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Maps dtype names in headers of safetensors to NumPy's names."""
READ_FILES = (
    "config.json",
    "generation_config.json",
    "sparse_attention_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files of a model that this program reads, beside its weights."""

Progress = Callable[[int, int], None]  # bytes done, bytes in all
_S = TypeVar("_S", bound="Sealed")

_CHUNK_BYTES = 16 << 20  # read and hashed at once
_SMALL_BYTES = 1 << 20  # files up to this size are hashed even by the fast check

_PART = r"(embed|final|block_\d{3,6})"
# A file beside the parameters, which `export` copies; or one of the parameters.
_FILE_NAME = (
    rf"(?!\.|.*\.safetensors\Z|manifest\.json\Z)[\w.-]+|params/{_PART}(/(?!\.\.?(/|\Z))[\w.-]+)+"
)
_SHARD_NAME = r"(?!\.)[\w.-]+\.safetensors"
Dtype = Annotated[str, named("|".join(DTYPES), " or ".join(map(repr, DTYPES)))]
_Side = Annotated[int, Meta(ge=1, le=1 << 40)]
_Shape = Annotated[tuple[_Side, ...], Meta(min_length=1)]


class Tensor(Record, frozen=True):
    """A stored array and the Hugging Face tensor it came from.

    Attributes:
        name: name of the tensor in the source.
        part: Orbax checkpoint that holds the array.
        path: keys of the array in the parameter tree.
        shape: shape of the array.
        dtype: dtype of the array, a key of `DTYPES`.
        source_shape: shape of the tensor.
        source_dtype: dtype of the tensor.
        transposed: whether the array is the tensor's transpose, reshaped; else only reshaped.
        sha256: SHA-256 of the array's bytes, little-endian, in the layout of the tensor.
        source_sha256: SHA-256 of the tensor's bytes; equal to `sha256` if the dtype was kept.
    """

    name: str
    part: Annotated[str, named(_PART, "the name of a part")]
    path: Annotated[tuple[str, ...], Meta(min_length=1)]
    shape: _Shape
    dtype: Dtype
    source_shape: _Shape
    source_dtype: Dtype
    transposed: bool
    sha256: Sha256
    source_sha256: Sha256

    @property
    def num_elements(self) -> int:
        """Number of elements of the array."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the array in bytes."""
        return self.num_elements * DTYPES[self.dtype].itemsize

    def to_source(self, array: np.ndarray) -> np.ndarray:
        """Reshapes, and transposes if needed, the array to the layout of the source tensor."""
        if self.transposed:
            return transpose(array.reshape(self.source_shape[::-1]))
        return array.reshape(self.source_shape)


class Shard(Record, frozen=True):
    """A safetensors file of the source, as needed to write it again.

    Attributes:
        file: file name.
        header: JSON header, padding included.
    """

    file: Annotated[str, named(_SHARD_NAME, "the name of a .safetensors file, without folders")]
    header: str


class File(Record, frozen=True):
    """Size and checksum of a file of the checkpoint."""

    size: Size
    sha256: Sha256


class HeaderRow(Record, frozen=True):
    """A tensor in a header of safetensors; its bytes follow the header."""

    dtype: str
    shape: tuple[Annotated[int, Meta(ge=0, le=1 << 40)], ...]
    data_offsets: tuple[Size, Size]


class Manifest(Record, frozen=True):
    """Content of a converted checkpoint.

    Attributes:
        versions: versions of this package and of the libraries that wrote the files.
        dtype: dtype of all arrays, or "keep" if tensors kept their own.
        num_parameters: number of elements of all arrays.
        source_sha256: SHA-256 of the source's configuration, headers and samples of data, which
            identifies a stopped conversion; see `fingerprint` for the whole content.
        tensors: all stored arrays.
        aliases: source tensors that repeat another one, as name to the other's name.
        dropped: names of source tensors that carry no weight and are not stored.
        shards: safetensors files of the source.
        files: size and checksum of every file of the directory but the manifest, by path.
    """

    versions: dict[str, str]
    dtype: Annotated[str, named("|".join(["keep", *DTYPES]), "'keep' or a dtype")]
    num_parameters: Size
    source_sha256: Sha256
    tensors: tuple[Tensor, ...]
    aliases: dict[str, str]
    dropped: tuple[str, ...]
    shards: tuple[Shard, ...]
    files: dict[Annotated[str, named(_FILE_NAME, "the name of a file of a checkpoint")], File]

    @property
    def num_bytes(self) -> int:
        """Total size of all files in bytes."""
        return sum(file.size for file in self.files.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of every byte of the weights, see `fingerprint`."""
        return fingerprint(
            self.files["config.json"].sha256,
            ((each.name, each.dtype, each.source_shape, each.sha256) for each in self.tensors),
        )

    def by_part(self) -> dict[str, list[Tensor]]:
        """Groups the tensors by part."""
        grouped: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            grouped.setdefault(tensor.part, []).append(tensor)
        return grouped

    def encode(self) -> bytes:
        """Encodes the content of manifest.json, which includes its own checksum."""
        return seal(FORMAT, self)


def fingerprint(
    config_sha256: str, tensors: Iterable[tuple[str, str, tuple[int, ...], str]]
) -> str:
    """Computes the SHA-256 of a model, equal before and after a conversion that keeps dtypes.

    Args:
        config_sha256: SHA-256 of config.json.
        tensors: name, dtype, shape and SHA-256 of each tensor as a Hugging Face checkpoint has it.
    """
    rows = sorted([name, dtype, list(shape), sha256] for name, dtype, shape, sha256 in tensors)
    return hashlib.sha256(json.dumps([config_sha256, rows]).encode()).hexdigest()


def read(path: Path, *, record: bool = False) -> Manifest:
    """Reads a manifest and checks that its fields are consistent.

    Args:
        record: whether it is the record of one part of a conversion, with the tensors and
            files of that part only.

    Raises:
        CheckpointError: if it is missing, damaged, of another format or unsound.
    """
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{shown(path)} is missing: {shown(path.parent)} is not a converted checkpoint"
        )
    content = reading.read_bytes(path, limit=reading.JSON_BYTES, error=CheckpointError)

    def decode(body: dict[str, Any]) -> Manifest:
        found = schema.read(body, Manifest)
        _check_tensors(found)
        if not record:
            _check_whole(found)
        return found

    return unseal(path, content, FORMAT, decode, "convert again")


def _check_tensors(found: Manifest) -> None:
    """Checks that the fields of each tensor are consistent.

    Raises:
        SchemaError: naming the tensor.
    """
    for number, tensor in enumerate(found.tensors):
        where = f"tensors[{number}]"
        if tensor.num_elements != math.prod(tensor.source_shape):
            raise SchemaError(f"{where}.shape and source_shape have different numbers of elements")
        if tensor.transposed and len(tensor.source_shape) != 2:
            raise SchemaError(f"{where}.source_shape must be that of a matrix to be transposed")
        if tensor.dtype == tensor.source_dtype and tensor.sha256 != tensor.source_sha256:
            raise SchemaError(f"{where}.source_sha256 must be its sha256: its dtype was kept")
        if found.dtype != (tensor.dtype if found.dtype in DTYPES else "keep"):
            raise SchemaError(f"{where}.dtype must be {found.dtype!r}, that of the checkpoint")
        if found.dtype == "keep" and tensor.dtype != tensor.source_dtype:
            raise SchemaError(f"{where}.dtype must be its source_dtype, since dtypes were kept")
    for what, keys in (
        ("name", [tensor.name for tensor in found.tensors]),
        ("part and path", [(tensor.part, tensor.path) for tensor in found.tensors]),
    ):
        if len(set(keys)) < len(keys):
            raise SchemaError(f"tensors has two of one {what}")


def _check_whole(found: Manifest) -> None:
    """Checks that tensors, files and shards of a whole checkpoint are complete and consistent.

    Raises:
        SchemaError: naming the field.
    """
    tensors = {tensor.name: tensor for tensor in found.tensors}
    if found.num_parameters != sum(tensor.num_elements for tensor in found.tensors):
        raise SchemaError("num_parameters is not the sum over the tensors")
    if "config.json" not in found.files:
        raise SchemaError("files lacks config.json")
    stored = {name.split("/")[1] for name in found.files if name.startswith("params/")}
    named = {tensor.part for tensor in found.tensors}
    if stored != named:
        raise SchemaError(f"files and tensors disagree about {min(stored ^ named)}")
    for alias, name in found.aliases.items():
        if name not in tensors or alias in tensors:
            raise SchemaError(f"aliases: {printable(alias)} must repeat a tensor that is stored")
    dropped = set(found.dropped)
    if len(dropped) < len(found.dropped) or dropped & (tensors.keys() | found.aliases.keys()):
        raise SchemaError("dropped names a tensor twice, or one that is stored")
    if len({shard.file.casefold() for shard in found.shards}) < len(found.shards):
        raise SchemaError("shards has two of one file")
    rows: dict[str, HeaderRow] = {}
    for number, shard in enumerate(found.shards):
        for name, row in _header(f"shards[{number}].header", shard.header).items():
            if name in rows:
                raise SchemaError(f"shards has two tensors of the name {printable(name)}")
            rows[name] = row
    for name, row in rows.items():
        tensor = tensors.get(found.aliases.get(name, name))
        where = f"shards: {printable(name)}"
        if tensor is None:
            if name not in dropped:
                raise SchemaError(f"{where} is neither stored nor dropped")
            continue
        size = tensor.num_elements * DTYPES[tensor.source_dtype].itemsize
        if (
            SAFETENSORS_DTYPES.get(row.dtype) != tensor.source_dtype
            or row.shape != tensor.source_shape
            or row.data_offsets[1] - row.data_offsets[0] != size
        ):
            raise SchemaError(f"{where} is not of the dtype, shape and size that tensors says")
    there = {found.aliases.get(name, name) for name in rows}
    lacking = (tensors.keys() - there) | ((dropped | found.aliases.keys()) - rows.keys())
    if lacking:
        raise SchemaError(f"shards lacks {printable(min(lacking))}")


def _header(where: str, text: str) -> dict[str, HeaderRow]:
    """Parses a safetensors header into its rows by tensor name.

    Raises:
        SchemaError: if it is malformed, or its tensors are not contiguous.
    """
    try:
        rows = header_rows(reading.parse_json(text))
    except SchemaError as error:
        raise SchemaError(f"{where}: {error}") from None
    except ValueError as error:
        raise SchemaError(f"{where} is not valid JSON: {error}") from None
    end = 0
    for name, row in sorted(rows.items(), key=lambda each: each[1].data_offsets):
        if row.data_offsets[0] != end:
            raise SchemaError(f"{where}: {printable(name)} does not begin where another ends")
        end = row.data_offsets[1]
    return rows


def header_rows(header: Any) -> dict[str, HeaderRow]:
    """The tensors of a parsed header of safetensors, by name.

    Raises:
        SchemaError: naming the tensor, if it is no such header.
    """
    found = {}
    for name, row in schema.read(header, dict[str, Any]).items():
        metadata = name == "__metadata__"
        try:
            read = schema.read(row, dict[str, str] | None if metadata else HeaderRow)
        except SchemaError as error:
            raise SchemaError(f"{printable(name)}: {error}") from None
        if not metadata:
            found[name] = read
    return found


@runtime_checkable
class Sealed(Protocol):
    """Content of a JSON file that includes its own checksum."""

    def encode(self) -> bytes:
        """Encodes the content of the file by `seal`."""
        ...


def seal(kind: str, body: Record | dict[str, Any]) -> bytes:
    """Encodes a JSON file that includes its format and the SHA-256 of its content."""
    body = {"format": kind, **msgspec.to_builtins(body)}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({"sha256": digest, **body}, indent=1).encode() + b"\n"


def unseal(
    path: Path, content: bytes, kind: str, decode: Callable[[dict[str, Any]], _S], way_out: str
) -> _S:
    """Decodes the content of a file that `seal` encoded.

    Args:
        path: path of the file, for errors.
        kind: expected format.
        decode: builds the result from the body given to `seal`.
        way_out: remedy that errors name if the file is damaged.

    Raises:
        CheckpointError: if the content is not, byte for byte, what `encode` of the result returns.
    """
    name = reading.shown(path)
    damaged = CheckpointError(f"{name} is damaged or was edited: {way_out}")
    try:
        body = reading.parse_json(content)
        del body["sha256"]
        if body.pop("format") != kind:
            raise CheckpointError(f"{name} is not of the format {kind!r}: {way_out}")
        found = decode(body)
        whole = found.encode() == content
    except CheckpointError:
        raise
    except SchemaError as error:
        raise CheckpointError(f"{name}: {error}: {way_out}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged from None
    if not whole:
        raise damaged
    return found


def counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that adds up bytes and reports them."""
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    return on_bytes


def check_files(
    directory: Path,
    manifest: Manifest,
    *,
    full: Collection[str] = (),
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Compares files with their sizes, and with their checksums if they have at most 1 MiB.

    Args:
        full: files whose checksums are compared whatever their size.
        on_bytes: called with numbers of bytes that were read.

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
    strange = [name for name in READ_FILES if name not in manifest.files]
    for path in (*sorted((directory / "params").rglob("*")), *(directory / n for n in strange)):
        there = os.path.lexists(path) and (path.is_symlink() or not path.is_dir())
        if there and path.relative_to(directory).as_posix() not in manifest.files:
            raise CheckpointError(
                f"{shown(path)} is not in the manifest: remove it, or convert again from a "
                "directory that holds it"
            )


def file_sums(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> File:
    """Computes size and SHA-256 of a regular file.

    Args:
        on_bytes: called with numbers of bytes that were read.

    Raises:
        CheckpointError: if it is not a regular file; a pipe is not waited for.
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{shown(path)} is not a regular file")
        buffer = memoryview(bytearray(max(1, min(_CHUNK_BYTES, status.st_size))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_bytes(count)
            size += count
    return File(size=size, sha256=digest.hexdigest())


def array_sha256(array: np.ndarray) -> str:
    """Computes the SHA-256 of an array's bytes in C order, little-endian."""
    return hashlib.sha256(array_bytes(array).data).hexdigest()


def array_bytes(array: np.ndarray) -> np.ndarray:
    """Returns an array's bytes, uint8, in C order; a view if it is contiguous already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def transpose(x: np.ndarray) -> np.ndarray:
    """Returns a contiguous copy of the transpose of a matrix."""
    out = np.empty(x.shape[::-1], x.dtype)
    for start in range(0, len(x), 128):  # rows that stay in the cache: five times faster than .T
        out[:, start : start + 128] = x[start : start + 128].T
    return out
