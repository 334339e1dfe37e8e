"""A checked, lazy reader of a Hugging Face checkpoint directory."""

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from convert import names
from qwen_jax.config import ModelConfig, model_config
from qwen_jax.manifest import DTYPES, CheckpointError, Progress, file_sums

INDEX = "model.safetensors.index.json"
# What ships with the weights and is copied byte for byte.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "sparse_attention_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)

_DTYPES = {"BF16": "bfloat16", "F32": "float32"}
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_JSON_BYTES = 16 << 20  # 100 times the header of the largest model; Python needs 30 times as much
_CHUNK_BYTES = 16 << 20
_SAMPLE_BYTES = 1 << 10


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A Hugging Face directory that holds exactly the tensors its configuration asks for.

    Attributes:
        tensors: those that are stored, by name, in the order of our parts.
        aliases: tensors that repeat another one, from name to the other's name.
        dropped: tensors that carry no weight.
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
        """Bytes of all stored tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def read(
        self, name: str, on_bytes: Callable[[int], None] = lambda _: None
    ) -> tuple[np.ndarray, str]:
        """A tensor and the SHA-256 of its bytes.

        Raises:
            CheckpointError: if the file cannot be read or changed since it was checked.
        """
        tensor = self.tensors[name]
        shard = self.shards[tensor.shard]
        data = np.empty(tensor.size, np.uint8)
        view = data.data
        digest = hashlib.sha256()
        try:
            with _open(shard.path) as file:
                if _state(file.fileno()) != shard.state:
                    raise CheckpointError(f"{shard.path} changed while it was read: start again")
                file.seek(tensor.start)
                done = 0
                while done < tensor.size:
                    count = file.readinto(view[done : done + _CHUNK_BYTES])
                    if not count:
                        raise CheckpointError(f"{shard.path} ends within {name}")
                    digest.update(view[done : done + count])
                    done += count
                    on_bytes(count)
        except OSError as error:
            raise CheckpointError(
                f"{shard.path}: {name} cannot be read: {error.strerror}"
            ) from None
        return data.view(DTYPES[tensor.dtype]).reshape(tensor.shape), digest.hexdigest()

    def fingerprint(self) -> str:
        """Checksum of the configuration, the headers and a sample of every tensor.

        Two fine-tunes of one model differ in the samples only.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        digest = hashlib.sha256(self.companions["config.json"].read_bytes())
        for shard in self.shards.values():
            digest.update(f"{shard.file} {len(shard.header)} ".encode() + shard.header)
            try:
                with _open(shard.path) as file:
                    for tensor in shard.tensors:
                        file.seek(tensor.start + max(0, tensor.size - _SAMPLE_BYTES) // 2)
                        digest.update(file.read(min(tensor.size, _SAMPLE_BYTES)))
            except OSError as error:
                raise CheckpointError(f"{shard.path} cannot be read: {error.strerror}") from None
        return digest.hexdigest()


def check(directory: str | os.PathLike) -> Source:
    """Check every file of a Hugging Face directory, reading headers only.

    Raises:
        CheckpointError: naming every file and tensor that is wrong.
        qwen_jax.config.ConfigError: if config.json cannot be used.
    """
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    root = Path(directory).resolve()
    companions = {
        name: regular_file(root, name) for name in COMPANIONS if os.path.lexists(root / name)
    }
    config = model_config(root)
    files = _shard_files(root)
    shards = {file: _shard(root, file) for file in sorted(set(files.values()))}
    if INDEX in os.listdir(root):
        companions[INDEX] = regular_file(root, INDEX)
    if not files:
        shards = {"model.safetensors": _shard(root, "model.safetensors")}
    problems = _index_problems(files, shards) if files else []
    found = {tensor.name: tensor for shard in shards.values() for tensor in shard.tensors}
    table = names.table(config)
    aliases = {}
    if config.tie_embeddings and names.HEAD in found and names.EMBEDDING in found:
        if not _same(shards, found[names.HEAD], found[names.EMBEDDING]):
            problems.append(
                f"{names.HEAD} differs from {names.EMBEDDING} although config.json ties them"
            )
        aliases[names.HEAD] = names.EMBEDDING
    dropped = tuple(sorted(name for name in found if names.DROPPED.fullmatch(name)))
    for name in sorted(table.keys() | found.keys() - aliases.keys() - set(dropped)):
        if name not in found:
            problems.append(f"{name} is missing")
        elif name not in table:
            problems.append(f"{found[name].shard}: {_shown(name)} is no tensor of this model")
        elif found[name].shape != table[name].source_shape:
            problems.append(
                f"{found[name].shard}: {name} has shape {list(found[name].shape)}, "
                f"config.json asks for {list(table[name].source_shape)}"
            )
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{directory}: {shown}{more}")
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

    Returns:
        How many shards were checked.

    Raises:
        CheckpointError: naming the file that differs.
    """
    known = [
        shard for shard in checked.shards.values() if re.fullmatch("[0-9a-f]{64}", shard.path.name)
    ]
    total = sum(shard.path.stat().st_size for shard in known)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for shard in known:
        if file_sums(shard.path, on_bytes).sha256 != shard.path.name:
            raise CheckpointError(
                f"{checked.directory / shard.file} is damaged: its SHA-256 is not its blob's name"
            )
    return len(known)


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


def _open(path: Path):
    """A checked file; it must not have become a link or a pipe since."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    return open(descriptor, "rb", buffering=0)


def _state(descriptor: int) -> tuple[int, ...]:
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
        with _open(target) as file:
            index = json.loads(file.read().decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {_shown(error)}") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path} has no weight_map")
    for tensor, file in files.items():
        if not isinstance(file, str) or not pattern.fullmatch(file):
            raise CheckpointError(
                f"{path}: {_shown(tensor)} is in {_shown(file)}, which is no file name"
            )
    return files


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _shard_files(root: Path) -> dict[str, str]:
    """From tensor to file, as the index says; empty for a checkpoint of one file without index.

    Raises:
        CheckpointError: if there are no weights, or two sets of them.
    """
    single = os.path.lexists(root / "model.safetensors")
    if os.path.lexists(root / INDEX):
        files = read_index(root, INDEX, _SHARD_NAME)
        if single and "model.safetensors" not in files.values():
            raise CheckpointError(f"{root} has both {INDEX} and model.safetensors: remove one")
        return files
    if single:
        return {}
    if any(root.glob("*.safetensors")):
        raise CheckpointError(f"{root / INDEX} is missing: copy it with the shards")
    if any(root.glob("*.bin")):
        raise CheckpointError(
            f"{root} has weights in .bin files only, which can run code: get the model in "
            "safetensors, or convert with --allow-pickle-weights"
        )
    raise CheckpointError(f"{root} has no model.safetensors and no {INDEX}")


def _index_problems(files: dict[str, str], shards: dict[str, Shard]) -> list[str]:
    problems = []
    for file, shard in shards.items():
        listed = {tensor for tensor, where in files.items() if where == file}
        stored = {tensor.name for tensor in shard.tensors}
        problems += [
            f"{file} lacks {_shown(name)}, which the index puts there" for name in listed - stored
        ]
        problems += [f"{file} holds {_shown(name)} against the index" for name in stored - listed]
    return sorted(problems)


def _shard(root: Path, file: str) -> Shard:
    """A file whose header safetensors and this module read alike.

    Raises:
        CheckpointError: naming the file, and the tensor if there is one.
    """
    path = root / file
    target = regular_file(root, file)
    try:
        with _open(target) as opened:
            state = _state(opened.fileno())
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
        raise CheckpointError(f"{path} is no valid safetensors file: {_shown(error)}") from None
    try:
        body = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
        body.pop("__metadata__", None)
        rows = {
            name: (row["dtype"], tuple(row["shape"]), *row["data_offsets"])
            for name, row in body.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed header: {_shown(error)}") from None
    if {name: row[:2] for name, row in rows.items()} != seen:
        raise CheckpointError(f"{path} has an ambiguous header")
    for name, (dtype, *_) in rows.items():
        if dtype not in _DTYPES and not names.DROPPED.fullmatch(name):
            raise CheckpointError(
                f"{path}: {_shown(name)} is of type {_shown(dtype)}: "
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


def _shown(text: object) -> str:
    """Text from a file that nobody checked, fit for one line of a terminal."""
    text = str(text)
    return (text if text.isprintable() else repr(text))[:200]


def _same(shards: dict[str, Shard], one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (one.dtype, one.shape, one.size) != (other.dtype, other.shape, other.size):
        return False
    try:
        with _open(shards[one.shard].path) as a, _open(shards[other.shard].path) as b:
            a.seek(one.start)
            b.seek(other.start)
            for start in range(0, one.size, _CHUNK_BYTES):
                count = min(_CHUNK_BYTES, one.size - start)
                if a.read(count) != b.read(count):
                    return False
    except OSError as error:
        raise CheckpointError(f"{one.shard}: {one.name} cannot be read: {error.strerror}") from None
    return True
