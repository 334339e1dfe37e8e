"""Conversion, streamed and resumable, to a converted checkpoint; loading without conversion."""

import contextlib
import functools
import importlib.metadata
import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import structs

from convert import names, pickled, publish, source
from qwen_jax.distributed import multihost
from qwen_jax.distributed.jax_settings import own_settings
from qwen_jax.models import params
from qwen_jax.storage import atomic, hub, orbax_io
from qwen_jax.storage import manifest as manifests
from qwen_jax.storage.manifest import DTYPES, CheckpointError, Manifest, Progress, Tensor, file_sums

_LIBRARIES = ("qwen-jax", "jax", "orbax-checkpoint", "safetensors", "numpy")
_NAMES = {"manifest.json", source.INDEX, *source.COMPANIONS}  # beside params/
_SPARE_BYTES = 64 << 20  # of disk, for what Orbax keeps beside the arrays


def load(
    directory: str | os.PathLike,
    *,
    dtype: Any = None,
    shardings: dict | None = None,
    verify: str = "fast",
    progress: Progress | None = None,
) -> dict:
    """Load the parameters of a converted checkpoint or a Hugging Face directory.

    See `qwen_jax.models.params.load`; `verify` is for converted checkpoints, others have no sums.

    Raises:
        CheckpointError: if a file is missing, damaged or does not fit config.json.
        qwen_jax.config.ConfigError: if config.json cannot be used.
    """
    if params.is_converted(directory):
        return params.load(
            directory, dtype=dtype, shardings=shardings, verify=verify, progress=progress
        )
    return load_huggingface(directory, dtype=dtype, shardings=shardings, progress=progress)


@own_settings()
def load_huggingface(
    directory: str | os.PathLike,
    *,
    dtype: Any = None,
    shardings: dict | None = None,
    progress: Progress | None = None,
) -> dict:
    """Load the parameters of a Hugging Face directory, a layer at a time.

    In a multi-process job each process reads only what its devices hold.

    Raises:
        CheckpointError: if a file is missing, damaged or does not fit config.json.
        qwen_jax.config.ConfigError: if config.json cannot be used.
    """
    checked = source.check(directory)
    if dtype is None:
        dtype = params.stored_dtype(tensor.dtype for tensor in checked.tensors.values())
    stack = params.Stack(checked.config, dtype, shardings)
    on_bytes = manifests.counter(progress, checked.num_bytes)
    for part, entries in _by_part(checked).items():
        leaves = {}
        for entry in entries:

            def read(index, entry=entry):
                return entry.piece(index, functools.partial(checked.read_piece, entry.name))

            leaves[entry.path] = stack.build(entry.path, entry.shape, read)
            on_bytes(checked.tensors[entry.name].size)
        stack.put(part, leaves)
    return stack.tree()


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    dtype: str = "keep",
    overwrite: bool = False,
    resume: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Turn a Hugging Face directory into a converted checkpoint.

    Every header is checked before anything is written. `dst` appears when it is complete;
    a stopped run leaves `dst.partial`, which `resume` continues. Peak memory is about that of a
    layer or of the output head, whichever is larger, twice over.

    The processes of a job share the parts, on a file system that all of them see; the first
    does the rest.

    Args:
        dtype: "bfloat16", "float32", or "keep" to leave tensors as they are.
        overwrite: replace an existing checkpoint, or start a stopped run again.
        resume: continue a stopped run; without one, start or, if `dst` is there, do nothing.
        allow_pickle: read weights that are in .bin files only, see `convert.pickled`.

    Raises:
        CheckpointError: if the source is damaged or `dst` cannot be written.
        qwen_jax.config.ConfigError: if config.json cannot be used.
    """
    if dtype not in ("keep", "bfloat16", "float32"):
        raise ValueError(f"{dtype=} must be 'keep', 'bfloat16' or 'float32'")
    output = publish.place(dst)
    with contextlib.ExitStack() as stack:
        src = hub.checkpoint(src)
        publish.check_apart(Path(src).resolve(), output)
        orbax_io.check_path(output)
        if allow_pickle and pickled.only(src):
            if not multihost.is_alone():
                raise CheckpointError(
                    f"{src} has weights in .bin files, which one process converts: start it "
                    "alone, with --num-processes 1"
                )
            if not resume:
                publish.Staging(output).check(overwrite=overwrite, check_ours=check_ours)
            src = stack.enter_context(pickled.as_safetensors(src, output))
        checked = source.check(src)
        outline = checked.outline()
        staging = stack.enter_context(publish.Staging(output))

        def begin() -> bool:
            return staging.begin(
                {"source": outline, "dtype": dtype},
                overwrite=overwrite,
                resume=resume,
                same=lambda directory: _is_conversion(directory, checked, dtype, progress),
                check_ours=check_ours,
                writes=writes,
            )

        if multihost.broadcast_json(begin):
            return params.read_manifest(output)
        with publish.errors(output):
            _check_one_disk(staging.partial)
            manifest = _write(checked, staging, dtype, outline, progress)
        if multihost.is_first():
            staging.publish()
    return manifest


def _is_conversion(
    directory: Path, checked: source.Source, dtype: str, progress: Progress | None
) -> bool:
    """Return True if a checkpoint is what a conversion would write; reads all of the source."""
    there = manifests.read(directory / "manifest.json")
    alike = (there.source_sha256, there.dtype) == (checked.outline(), dtype)
    beside = {name: file for name, file in there.files.items() if not name.startswith("params/")}
    if not alike or beside != {name: file_sums(p) for name, p in checked.companions.items()}:
        return False
    sums = checked.sums(progress)
    return {each.name: each.source_sha256 for each in there.tensors} == {
        name: sums[name] for name in checked.tensors
    }


def check_ours(directory: Path) -> None:
    """Refuse a directory with files that no conversion wrote.

    Raises:
        CheckpointError: naming the file.
    """
    files = manifests.read(directory / "manifest.json").files
    publish.check_written(directory, files, "manifest.json", by_name="params/")


def writes(name: str) -> bool:
    """Return True if a conversion writes a file of this path."""
    folder, _, rest = name.partition("/")
    if folder == "params":
        return orbax_io.wrote(rest.partition("/")[2])
    return re.sub(r"(\.[0-9a-f]{8})?\.partial$", "", name) in _NAMES


def _check_one_disk(directory: Path) -> None:
    """Raise CheckpointError if the processes of a job do not see one and the same directory."""
    if multihost.is_alone():
        return
    path = directory / "mark"

    def mark() -> str:
        text = os.urandom(8).hex()
        atomic.write(path, text)
        return text

    expected = multihost.broadcast_json(mark)
    if not path.is_file() or path.read_text() != expected:
        raise CheckpointError(
            f"{directory}, where process 0 writes, is not here: several processes convert onto "
            "a file system that all of them see"
        )


def _write(
    checked: source.Source,
    staging: publish.Staging,
    dtype: str,
    outline: str,
    progress: Progress | None,
) -> Manifest:
    """Write the missing parts of the checkpoint, each process its share; then the manifest."""
    records = staging.partial / "parts"
    records.mkdir(exist_ok=True)
    whole = Manifest(
        versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
        dtype=dtype,
        num_parameters=0,
        source_sha256=outline,
        tensors=(),
        aliases=checked.aliases,
        dropped=checked.dropped,
        shards=tuple(
            manifests.Shard(file=shard.file, header=shard.header.decode("utf-8"))
            for shard in checked.shards.values()
        ),
        files={},
    )
    grouped = _by_part(checked)
    own = multihost.local_share(list(grouped))
    sizes = {part: sum(checked.tensors[e.name].size for e in grouped[part]) for part in own}
    on_bytes = manifests.counter(progress, sum(sizes.values()))
    done = {
        part: _recorded(
            staging.directory, records / f"{part}.json", checked, grouped[part], dtype, on_bytes
        )
        for part in own
    }
    there = multihost.all_gather_json([part for part, record in done.items() if record])
    if multihost.is_first():
        kept = {part for parts in there for part in parts}
        _clean(staging.directory, kept)
        _check_space(checked, staging.directory, dtype, [p for p in grouped if p not in kept])
    multihost.await_all()
    for part, record in done.items():
        if record is None:
            entries = grouped[part]
            record = _write_part(checked, staging.directory, part, entries, dtype, whole, on_bytes)
            atomic.write(records / f"{part}.json", record.encode())
    multihost.await_all()
    if multihost.is_first():
        parts = [manifests.read(records / f"{part}.json", record=True) for part in grouped]
        _write_manifest(checked, staging.directory, whole, parts)
    multihost.await_all()
    manifest = params.read_manifest(staging.directory)
    files = frozenset(multihost.local_share(list(manifest.files)))
    manifests.check_files(staging.directory, manifest, full=files, on_bytes=lambda _: on_bytes(0))
    multihost.await_all()
    return manifest


def _write_manifest(
    checked: source.Source, directory: Path, whole: Manifest, parts: list[Manifest]
) -> None:
    """Copy the companion files, and write the manifest of them and of all parts."""
    tensors = [tensor for part in parts for tensor in part.tensors]
    files = {name: file for part in parts for name, file in part.files.items()}
    for name, path in checked.companions.items():
        copy = directory / name
        shutil.copyfile(path, copy)
        atomic.sync(copy)
        files[name] = manifests.file_sums(copy)
    manifest = structs.replace(
        whole,
        num_parameters=sum(tensor.num_elements for tensor in tensors),
        tensors=tuple(tensors),
        files=files,
    )
    atomic.write(directory / "manifest.json", manifest.encode())


def _write_part(
    checked: source.Source,
    directory: Path,
    part: str,
    entries: list[names.Entry],
    dtype: str,
    whole: Manifest,
    on_bytes: Callable[[int], None],
) -> Manifest:
    """Convert a part; return the manifest of it alone."""
    leaves, tensors = {}, []
    for entry in entries:
        raw, source_sha256 = checked.read(entry.name, on_bytes)
        found = checked.tensors[entry.name].dtype
        kept = found if dtype == "keep" else dtype
        if kept != found:
            raw = raw.astype(DTYPES[kept])
        sha256 = source_sha256 if kept == found else manifests.array_sha256(raw)
        tensors.append(_tensor(entry, found, kept, sha256, source_sha256))
        leaves[entry.path] = entry.to_ours(raw)
        del raw
    files = params.save_part(directory, part, leaves)
    return structs.replace(whole, tensors=tuple(tensors), files=files, shards=())


def _tensor(entry: names.Entry, found: str, kept: str, sha256: str, source_sha256: str) -> Tensor:
    """Build the manifest entry of a tensor of dtype `found`, stored as `kept`."""
    return Tensor(
        name=entry.name,
        part=entry.part,
        path=entry.path,
        shape=entry.shape,
        dtype=kept,
        source_shape=entry.source_shape,
        source_dtype=found,
        transposed=entry.transposed,
        sha256=sha256,
        source_sha256=source_sha256,
    )


def _recorded(
    directory: Path,
    path: Path,
    checked: source.Source,
    entries: list[names.Entry],
    dtype: str,
    on_bytes: Callable[[int], None],
) -> Manifest | None:
    """The record of a part whose files are as they were written; else None.

    Raises:
        CheckpointError: if the source has other bytes than when it was written.
    """
    try:
        record = manifests.read(path, record=True)
        for name, expected in record.files.items():
            if manifests.file_sums(directory / name) != expected:
                return None
    except (CheckpointError, OSError):
        return None
    for entry, there in itertools.zip_longest(entries, record.tensors):
        if entry is None or there is None:
            return None
        found = checked.tensors[entry.name].dtype
        kept = found if dtype == "keep" else dtype
        if there != _tensor(entry, found, kept, there.sha256, there.source_sha256):
            return None
    for there in record.tensors:
        if checked.sha256(there.name, on_bytes) != there.source_sha256:
            raise CheckpointError(
                f"{directory.parent} was made from another source, whose {there.name} differs: "
                "start again with --overwrite"
            )
    return record


def _clean(directory: Path, keep: set[str]) -> None:
    """Remove everything but the parts to keep."""
    for path in [*directory.iterdir(), *(directory / "params").glob("*")]:
        if path.name == "params" or (path.parent.name == "params" and path.name in keep):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_space(checked: source.Source, directory: Path, dtype: str, parts: list[str]) -> None:
    """Raise CheckpointError if the disk cannot take the parts."""
    needed = _SPARE_BYTES
    for entry in checked.table.values():
        if entry.part in parts:
            found = checked.tensors[entry.name]
            kept = found.dtype if dtype == "keep" else dtype
            needed += found.size // DTYPES[found.dtype].itemsize * DTYPES[kept].itemsize
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(
            f"{directory} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        )


def _by_part(checked: source.Source) -> dict[str, list[names.Entry]]:
    grouped: dict[str, list[names.Entry]] = {}
    for entry in checked.table.values():
        grouped.setdefault(entry.part, []).append(entry)
    return grouped
