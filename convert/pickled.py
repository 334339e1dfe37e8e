"""Conversion of .bin weights to safetensors, in a separate process: a pickle can run code.

PyTorch's `weights_only` unpickler is the guard; the process is there because that guard has had
holes (CVE-2025-32434, CVE-2026-24747).
"""

import contextlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert import files, publish, source
from qwen_jax.files.reading import printable, shown
from qwen_jax.storage import atomic
from qwen_jax.storage.manifest import CheckpointError

_INDEX = "pytorch_model.bin.index.json"
_SINGLE = "pytorch_model.bin"
_BIN_NAME = re.compile(r"[\w.-]+\.bin", re.ASCII)
_MARK = "qwen-jax unpickled 1"  # a file that says whose the directory is, and locks it
_WEIGHTS = "weights"
_KINDS = {"bfloat16": "BF16", "bool": "BOOL", "uint8": "U8"} | {
    f"{kind}{bits}": f"{kind[0].upper()}{bits}"
    for kind in ("float", "int")
    for bits in (8, 16, 32, 64)
    if (kind, bits) != ("float", 8)
}
_TORCH = (2, 10)  # the first version whose weights_only unpickler has no known hole


def only(directory: str | os.PathLike) -> bool:
    """Return True if a directory has weights in .bin files and none in safetensors."""
    directory = Path(directory)
    return any(directory.glob("*.bin")) and not any(directory.glob("*.safetensors"))


@contextlib.contextmanager
def as_safetensors(src: str | os.PathLike, output: Path) -> Iterator[Path]:
    """Yield a directory beside `output` with `src` as safetensors, removed on exit.

    Raises:
        CheckpointError: if PyTorch is missing or too old, or a file holds more than tensors.
    """
    directory = output.with_name(output.name + ".unpickled")
    with publish.errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = _begin(directory)
        try:
            _run(Path(src), directory / _WEIGHTS)
            yield directory / _WEIGHTS
        finally:
            shutil.rmtree(directory / _WEIGHTS, ignore_errors=True)
            (directory / _MARK).unlink(missing_ok=True)
            directory.rmdir()
            os.close(lock)


@contextlib.contextmanager
def headers(src: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary directory with `src` as safetensors, whose weights are sparse-file holes.

    Raises:
        CheckpointError: as `as_safetensors`.
    """
    with tempfile.TemporaryDirectory(prefix="qwen-jax-") as scratch:
        _run(Path(src), Path(scratch) / _WEIGHTS, "--headers")
        yield Path(scratch) / _WEIGHTS


def _begin(directory: Path) -> int:
    """Create the directory, empty it of leftovers of a killed run, and return its lock.

    Raises:
        CheckpointError: if it holds something else, or another process works there.
        OSError: if it cannot be created.
    """
    if os.path.lexists(directory):
        names = set(os.listdir(directory)) if directory.is_dir() else {"no directory"}
        if directory.is_symlink() or names - ({_WEIGHTS, _MARK} if _MARK in names else set()):
            raise CheckpointError(
                f"{shown(directory)} is in the way and was not written here: move it away or "
                "choose another path"
            )
    directory.mkdir(exist_ok=True)
    busy = CheckpointError(f"another process is writing {shown(directory)}")
    lock = atomic.lock(directory / _MARK, busy)
    try:
        if os.path.lexists(directory / _WEIGHTS):
            shutil.rmtree(directory / _WEIGHTS)
    except OSError:
        os.close(lock)
        raise
    return lock


def _run(src: Path, dst: Path, *flags: str) -> None:
    """Run this module in a separate process.

    Raises:
        CheckpointError: with its last line on stderr, if it fails.
    """
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError(
            "weights in .bin files need PyTorch: pip install -e '.[bin]' in a checkout of qwen-jax"
        ) from None
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < _TORCH:
        raise CheckpointError(f"PyTorch {version} is too old to read .bin files: install >= 2.10")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCH_")
    }
    child = subprocess.run(
        [sys.executable, "-m", "convert.pickled", str(src), str(dst), *flags],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"died with status {child.returncode}"]
        raise CheckpointError(f"{src}: {lines[-1]}")


def main(src: Path, dst: Path, *, headers_only: bool = False) -> None:
    """Convert the .bin files of `src` to safetensors in `dst`; run in the separate process.

    Args:
        headers_only: write holes in place of the weights.

    Raises:
        CheckpointError: if a file is malformed or holds more than tensors.
    """
    import torch
    from safetensors.torch import save_file

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    root = src.resolve()
    weight_files = {}
    if os.path.lexists(root / _INDEX):
        weight_files = files.read_index(root, _INDEX, _BIN_NAME)
    names = sorted(set(weight_files.values())) or [_SINGLE]
    paths = {name: files.regular_file(root, name) for name in names}
    dst.mkdir()
    weight_map = {}
    for number, (name, path) in enumerate(paths.items(), 1):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        whole = isinstance(tensors, dict) and all(
            isinstance(key, str) and isinstance(value, torch.Tensor)
            for key, value in tensors.items()
        )
        if not whole:
            raise CheckpointError(f"{name} is not a dict of tensors")
        shard = f"model-{number:05d}-of-{len(paths):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, shard)
        seen = set()
        for key, value in tensors.items() if not headers_only else ():
            shared = value.untyped_storage().data_ptr() in seen
            seen.add(value.untyped_storage().data_ptr())
            tensors[key] = value.clone() if shared else value.contiguous()
        if headers_only:
            _save_header(tensors, dst / shard)
        else:
            save_file(tensors, dst / shard, {"format": "pt"})
    (dst / source.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for name in source.COMPANIONS:
        if os.path.lexists(root / name):
            shutil.copyfile(files.regular_file(root, name), dst / name)


def _save_header(tensors: dict[str, Any], path: Path) -> None:
    """Writes a safetensors file with a hole in place of the tensors' bytes.

    Raises:
        CheckpointError: if a tensor has an unknown dtype.
    """
    rows, end = {}, 0
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _KINDS:
            raise CheckpointError(f"{printable(name)} is of {kind}, which no checkpoint has")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        rows[name] = {"dtype": _KINDS[kind], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    header = json.dumps(rows).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + end)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), headers_only="--headers" in sys.argv[3:])
    except Exception as error:
        # Whatever the file provoked becomes one line for the parent.
        sys.exit(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
