"""Export of a converted checkpoint to a Hugging Face directory, byte for byte if unchanged."""

import functools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Annotated

from convert import publish, source
from qwen_jax.files import reading, schema
from qwen_jax.files.schema import named
from qwen_jax.models import params
from qwen_jax.storage import atomic
from qwen_jax.storage import manifest as manifests
from qwen_jax.storage.manifest import CheckpointError, File, Manifest, Progress

RECORD = ".qwen-jax-export.json"
_FORMAT = "qwen-jax export 1"
_DTYPES = {ours: theirs for theirs, ours in manifests.SAFETENSORS_DTYPES.items()}


class Record(schema.Record, frozen=True):
    """Record of the files that an export wrote, by name."""

    files: dict[Annotated[str, named(r"[\w.-]+", "the name of a file")], File]

    def encode(self) -> bytes:
        """Encode the content of `RECORD`, which includes its own checksum."""
        return manifests.seal(_FORMAT, self)


def export(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Write the Hugging Face directory that a checkpoint was converted from.

    Files, tensors per file, headers and the index are those of the source, and one file more:
    `RECORD`, with the sums of all others, by which `dst` is known to be ours and may be replaced.
    `dst` appears when it is complete. Every tensor is checked against its SHA-256 on the way.

    Returns:
        What differs from the source, one sentence each; empty if every byte is the same.

    Raises:
        CheckpointError: if the checkpoint is damaged or `dst` cannot be written.
        qwen_jax.config.ConfigError: if config.json cannot be used.
    """
    directory, output = Path(src).resolve(), publish.place(dst)
    publish.check_apart(directory, output)
    manifest = params.verify(directory)
    changed = sorted({t.dtype for t in manifest.tensors if t.dtype != t.source_dtype})
    differences = tuple(
        [f"weights are {dtype}, to which they were converted" for dtype in changed]
        + [f"{len(manifest.dropped)} rotary buffers are left out"] * bool(manifest.dropped)
    )
    with publish.Staging(dst) as staging:
        staging.begin(
            {"export": manifest.source_sha256},
            overwrite=overwrite,
            resume=not overwrite,  # what a stopped export has left is of no use, nor in the way
            same=lambda _: False,
            check_ours=_check_ours,
            writes=_writes,
        )
        with publish.errors(output):
            shutil.rmtree(staging.directory)
            staging.directory.mkdir()
            _write(directory, staging.directory, manifest, bool(differences), progress)
        staging.publish()
    return differences


def _check_ours(directory: Path) -> None:
    """Refuse a directory that holds what no export wrote.

    Raises:
        CheckpointError: naming the file.
    """
    path = directory / RECORD
    if not os.path.lexists(path):
        raise CheckpointError(f"it has no {RECORD}, so it was not exported")
    content = reading.read_bytes(path, limit=reading.JSON_BYTES, error=CheckpointError)

    decode = functools.partial(schema.read, kind=Record)
    record = manifests.unseal(path, content, _FORMAT, decode, "export again")
    publish.check_written(directory, record.files, RECORD)


def _writes(name: str) -> bool:
    """Return True if an export writes a file of this path."""
    known = {RECORD, source.INDEX, *source.COMPANIONS}
    return (
        re.sub(r"(\.[0-9a-f]{8})?\.partial$", "", name) in known
        or source.SHARD_NAME.fullmatch(name) is not None
    )


def _write(
    directory: Path, output: Path, manifest: Manifest, changed: bool, progress: Progress | None
) -> None:
    places: dict[str, tuple[Path, int]] = {}
    for shard in manifest.shards:
        header, offsets = _layout(shard.header, manifest, changed)
        path = output / shard.file
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        places |= {name: (path, 8 + len(header) + start) for name, start in offsets.items()}
    names = {tensor.name: [tensor.name] for tensor in manifest.tensors}
    for alias, name in manifest.aliases.items():
        names[name].append(alias)
    total = sum(tensor.num_bytes for tensor in manifest.tensors)
    done = 0
    for part, tensors in manifest.by_part().items():
        leaves = params.load_part(directory, part, tensors)
        for tensor in tensors:
            data = manifests.array_bytes(tensor.to_source(leaves.pop(tensor.path)))
            if manifests.array_sha256(data) != tensor.sha256:
                raise CheckpointError(
                    f"{directory / 'params' / part}: {tensor.name} is damaged: "
                    "its SHA-256 is not the manifest's"
                )
            for path, start in (places[name] for name in names[tensor.name] if name in places):
                with path.open("r+b") as file:
                    file.seek(start)
                    file.write(data.data)
            done += data.nbytes
            if progress:
                progress(done, total)
    for name in manifest.files:
        if not name.startswith("params/"):
            shutil.copyfile(directory / name, output / name)
    if changed and source.INDEX in manifest.files:
        _update_index(
            output / source.INDEX,
            {name: path.name for name, (path, _) in places.items()},
            sum(tensor.num_bytes * len(names[tensor.name]) for tensor in manifest.tensors),
        )
    for path in output.iterdir():
        atomic.sync(path)
    source.check(output)
    files = {path.name: manifests.file_sums(path) for path in sorted(output.iterdir())}
    atomic.write(output / RECORD, Record(files).encode())


def _layout(text: str, manifest: Manifest, changed: bool) -> tuple[bytes, dict[str, int]]:
    """Return the header of a shard, and the offset of each tensor after it."""
    body = json.loads(text)
    metadata = body.pop("__metadata__", None)
    if not changed:
        return text.encode(), {name: row["data_offsets"][0] for name, row in body.items()}
    stored = {tensor.name: tensor for tensor in manifest.tensors}
    stored |= {alias: stored[name] for alias, name in manifest.aliases.items()}
    rows, offsets, end = {}, {}, 0
    for name in sorted(body.keys() & stored, key=lambda name: body[name]["data_offsets"]):
        tensor = stored[name]
        offsets[name], end = end, end + tensor.num_bytes
        rows[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": tensor.source_shape,
            "data_offsets": [offsets[name], end],
        }
    whole = {"__metadata__": metadata, **rows} if metadata is not None else rows
    header = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8), offsets


def _update_index(path: Path, files: dict[str, str], num_bytes: int) -> None:
    """Remove tensors that are not stored from the index, and correct its total size."""
    index = reading.read_object(path, error=CheckpointError)
    listed, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path} has no weight_map")
    index["weight_map"] = {name: files[name] for name in listed if name in files}
    index["metadata"] = {
        **(metadata if isinstance(metadata, dict) else {}),
        "total_size": num_bytes,
    }
    path.write_text(json.dumps(index, indent=2) + "\n")
