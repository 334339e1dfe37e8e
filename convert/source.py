"""Source: a checked, lazy reader of a Hugging Face checkpoint directory."""

import contextlib
import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from convert import names, sums
from convert.files import (
    CHUNK_BYTES,
    Shard,
    Tensor,
    file_state,
    open_file,
    read_index,
    read_shards,
    regular_file,
    same_bytes,
)
from qwen_jax.config import ModelConfig
from qwen_jax.distributed import multihost
from qwen_jax.files import reading
from qwen_jax.files.reading import printable, reason, shown
from qwen_jax.models.configs import model_config
from qwen_jax.storage import hub
from qwen_jax.storage.manifest import (
    DTYPES,
    READ_FILES,
    CheckpointError,
    Progress,
    counter,
    file_sums,
    fingerprint,
)

INDEX = "model.safetensors.index.json"
# What ships with the weights and is copied byte for byte.
COMPANIONS = (
    *READ_FILES,
    "vocab.json",
    "merges.txt",
)

SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_SAMPLE_BYTES = 1 << 10


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A Hugging Face directory that holds exactly the tensors its configuration asks for.

    Attributes:
        tensors: tensors to store, by name, in the order of the parts.
        aliases: tensors that repeat another one, as name to the other's name.
        dropped: names of tensors that carry no weight.
        companions: paths of the files to copy, by name.
    """

    directory: Path
    config: ModelConfig
    table: dict[str, names.Entry]
    shards: dict[str, Shard]
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    dropped: tuple[str, ...]
    companions: dict[str, Path]

    @property
    def num_bytes(self) -> int:
        """Total bytes of all stored tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def read(
        self, name: str, on_bytes: Callable[[int], None] = lambda _: None
    ) -> tuple[np.ndarray, str]:
        """Read a tensor; return it and the SHA-256 of its bytes.

        Raises:
            CheckpointError: if the file cannot be read or changed since it was checked.
        """
        tensor = self.tensors[name]
        data = np.empty(tensor.size, np.uint8)
        digest = hashlib.sha256()

        def on_chunk(chunk: memoryview) -> None:
            digest.update(chunk)
            on_bytes(len(chunk))

        with self._opened(tensor) as fill:
            fill(data.data, 0, on_chunk)
        return data.view(DTYPES[tensor.dtype]).reshape(tensor.shape), digest.hexdigest()

    def sha256(self, name: str, on_bytes: Callable[[int], None] = lambda _: None) -> str:
        """Compute the SHA-256 of a tensor's bytes, without holding them in memory.

        Raises:
            CheckpointError: as `read`.
        """
        tensor = self.tensors[name]
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(CHUNK_BYTES, tensor.size)))
        with self._opened(tensor) as fill:
            for start in range(0, tensor.size, CHUNK_BYTES):
                chunk = buffer[: tensor.size - start]
                fill(chunk, start)
                digest.update(chunk)
                on_bytes(len(chunk))
        return digest.hexdigest()

    def read_piece(self, name: str, cut: tuple[slice, ...]) -> np.ndarray:
        """Read the part of a tensor at a tuple of slices, one for each axis.

        Whole rows are read at once, parts of rows row by row; no other byte is read.

        Raises:
            CheckpointError: as `read`.
        """
        tensor = self.tensors[name]
        found = np.empty([each.stop - each.start for each in cut], DTYPES[tensor.dtype])
        row_bytes = math.prod(tensor.shape[1:]) * found.itemsize
        start = cut[0].start * row_bytes + sum(each.start for each in cut[1:]) * found.itemsize
        whole_rows = found.shape[1:] == tensor.shape[1:]
        runs = found.reshape(1 if whole_rows else len(found), -1).view(np.uint8)
        with self._opened(tensor) as fill:
            for number, run in enumerate(runs):
                fill(run.data, start + number * row_bytes)
        return found

    @contextlib.contextmanager
    def _opened(self, tensor: Tensor) -> Iterator[Callable[..., None]]:
        """Open the file of a tensor; yield a function that fills a buffer from an offset on.

        Raises:
            CheckpointError: if the file cannot be read or changed since it was checked.
        """
        shard = self.shards[tensor.shard]
        try:
            with open_file(shard.path) as file:
                if file_state(file.fileno()) != shard.state:
                    raise CheckpointError(
                        f"{shown(shard.path)} changed while it was read: start again"
                    )

                def fill(
                    buffer: memoryview,
                    offset: int,
                    on_chunk: Callable[[memoryview], None] = lambda _: None,
                ) -> None:
                    file.seek(tensor.start + offset)
                    done = 0
                    while done < len(buffer):
                        count = file.readinto(buffer[done : done + CHUNK_BYTES])
                        if not count:
                            raise CheckpointError(
                                f"{shown(shard.path)} ends within {printable(tensor.name)}"
                            )
                        on_chunk(buffer[done : done + count])
                        done += count

                yield fill
        except OSError as error:
            raise CheckpointError(
                f"{shown(shard.path)}: {printable(tensor.name)} cannot be read: {reason(error)}"
            ) from None

    def sums(self, progress: Progress | None = None) -> dict[str, str]:
        """Return the SHA-256 of every tensor's bytes, by name; see `convert.sums`.

        Raises:
            CheckpointError: if a file cannot be read or changes meanwhile.
        """
        return sums.of(self.shards, self.tensors, self.sha256, progress)

    def fingerprint(self, progress: Progress | None = None) -> str:
        """Return a checksum of the configuration and of every byte of the tensors.

        `Manifest.fingerprint` of a converted checkpoint is the same if dtypes were kept.

        Raises:
            CheckpointError: if a file cannot be read or changes meanwhile.
        """
        found = self.sums(progress)
        rows = ((name, each.dtype, each.shape, found[name]) for name, each in self.tensors.items())
        return fingerprint(file_sums(self.companions["config.json"]).sha256, rows)

    def outline(self) -> str:
        """Return a checksum of the configuration, the headers and a sample of every tensor.

        It distinguishes most models without reading them whole; see `fingerprint`.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        digest = hashlib.sha256(self.companions["config.json"].read_bytes())
        for shard in self.shards.values():
            digest.update(f"{shard.file} {len(shard.header)} ".encode() + shard.header)
            try:
                with open_file(shard.path) as file:
                    for tensor in shard.tensors:
                        file.seek(tensor.start + max(0, tensor.size - _SAMPLE_BYTES) // 2)
                        digest.update(file.read(min(tensor.size, _SAMPLE_BYTES)))
            except OSError as error:
                raise CheckpointError(
                    f"{shown(shard.path)} cannot be read: {reason(error)}"
                ) from None
        return digest.hexdigest()


def _companion(root: Path, name: str) -> Path:
    """Return the path of a file to copy.

    Raises:
        CheckpointError: if it is not a regular file of the directory, or too large to be read.
    """
    path = regular_file(root, name)
    size = path.stat().st_size
    if size > reading.JSON_BYTES:
        raise CheckpointError(
            f"{shown(root / name)} has {size:,} bytes, more than the {reading.JSON_BYTES:,} allowed"
        )
    return path


def check(directory: str | os.PathLike) -> Source:
    """Check every file of a Hugging Face directory, reading headers only.

    Raises:
        CheckpointError: naming every file and tensor that is wrong.
        qwen_jax.config.ConfigError: if config.json cannot be used.
    """
    directory = hub.checkpoint(directory)
    if not os.path.isdir(directory):
        raise CheckpointError(f"{shown(directory)} is not a directory")
    root = directory.resolve()
    companions = {
        name: _companion(root, name) for name in COMPANIONS if os.path.lexists(root / name)
    }
    config = model_config(root)
    files = _shard_files(root)
    shards = read_shards(root, sorted(set(files.values())) or ["model.safetensors"])
    if files:
        companions[INDEX] = regular_file(root, INDEX)
    problems = _index_problems(files, shards) if files else []
    found = {tensor.name: tensor for shard in shards.values() for tensor in shard.tensors}
    if config.num_layers > len(found):
        raise CheckpointError(
            f"{shown(directory)}: config.json says num_hidden_layers={config.num_layers}, and "
            f"the files hold {len(found)} tensors"
        )
    aliases = {}
    embedding, head = names.embedding_and_head(config)
    head_only = config.tie_embeddings and head in found and embedding not in found
    table = names.table(config, head if head_only else None)
    if config.tie_embeddings and head in found and not head_only:
        if not same_bytes(shards, found[head], found[embedding]):
            problems.append(f"{head} differs from {embedding} although config.json ties them")
        aliases[head] = embedding
    dropped = tuple(sorted(name for name in found if names.DROPPED.fullmatch(name)))
    for name in sorted(table.keys() | found.keys() - aliases.keys() - set(dropped)):
        if name not in found:
            problems.append(f"{name} is missing")
        elif name not in table:
            problems.append(f"{found[name].shard}: {printable(name)} is no tensor of this model")
        elif found[name].shape != table[name].source_shape:
            problems.append(
                f"{found[name].shard}: {name} has shape {list(found[name].shape)}, "
                f"config.json asks for {list(table[name].source_shape)}"
            )
    if problems:
        first = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{shown(directory)}: {first}{more}")
    return Source(
        directory=root,
        config=config,
        table=table,
        shards=shards,
        tensors={name: found[name] for name in table},
        aliases=aliases,
        dropped=dropped,
        companions=companions,
    )


def verify_blobs(checked: Source, progress: Progress | None = None) -> int:
    """Check the shards whose SHA-256 is known: in a Hugging Face cache it is the blob's name.

    The processes of a job divide them.

    Returns:
        Number of shards that were checked.

    Raises:
        CheckpointError: naming the file that differs.
    """
    known = [
        shard for shard in checked.shards.values() if re.fullmatch("[0-9a-f]{64}", shard.path.name)
    ]
    own = multihost.local_share(known)
    on_bytes = counter(progress, sum(shard.path.stat().st_size for shard in own))
    for shard in own:
        if file_sums(shard.path, on_bytes).sha256 != shard.path.name:
            raise CheckpointError(
                f"{shown(checked.directory / shard.file)} is damaged: "
                "its SHA-256 is not its blob's name"
            )
    multihost.await_all()
    return len(known)


def _shard_files(root: Path) -> dict[str, str]:
    """Map tensors to files by the index; {} for a checkpoint of one file without index.

    Raises:
        CheckpointError: if there are no weights, or two sets of them.
    """
    single = os.path.lexists(root / "model.safetensors")
    if os.path.lexists(root / INDEX):
        files = read_index(root, INDEX, SHARD_NAME)
        if single and "model.safetensors" not in files.values():
            raise CheckpointError(
                f"{shown(root)} has both {INDEX} and model.safetensors: remove one"
            )
        return files
    if single:
        return {}
    if any(root.glob("*.safetensors")):
        raise CheckpointError(f"{shown(root / INDEX)} is missing: copy it with the shards")
    if any(root.glob("*.bin")):
        raise CheckpointError(
            f"{shown(root)} has weights in .bin files only, which can run code: get the model in "
            "safetensors, or convert with --allow-pickle-weights"
        )
    raise CheckpointError(f"{shown(root)} has no model.safetensors and no {INDEX}")


def _index_problems(files: dict[str, str], shards: dict[str, Shard]) -> list[str]:
    problems = []
    listing: dict[str, set[str]] = {file: set() for file in shards}
    for tensor, file in files.items():
        listing[file].add(tensor)
    for file, shard in shards.items():
        listed = listing[file]
        stored = {tensor.name for tensor in shard.tensors}
        problems += [
            f"{file} lacks {printable(name)}, which the index puts there"
            for name in listed - stored
        ]
        problems += [
            f"{file} holds {printable(name)} against the index" for name in stored - listed
        ]
    return sorted(problems)
