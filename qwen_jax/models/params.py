"""Parameter trees: shapes, placement, saving, loading; defines the converted checkpoint.

A checkpoint is a directory:

    manifest.json            what must be there, with checksums (see `Manifest`)
    config.json, ...         files that came with the weights, byte for byte
    params/embed             Orbax checkpoints, one per part of the tree: the embedding,
    params/block_000 ...     each layer (arrays without the layer axis),
    params/final             the last norm and the output head

Loading a model needs memory for its parameters and one part.
"""

import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen_jax.config import ModelConfig
from qwen_jax.distributed import multihost, sharding
from qwen_jax.distributed.jax_settings import own_settings
from qwen_jax.files.reading import shown
from qwen_jax.models.configs import model_config
from qwen_jax.models.families import family
from qwen_jax.storage import manifest as manifests
from qwen_jax.storage import orbax_io
from qwen_jax.storage.manifest import DTYPES, CheckpointError, File, Manifest, Progress, Tensor


def abstract(config: ModelConfig, dtype=jnp.bfloat16) -> dict:
    """Returns the parameter tree of a model without values: nested dicts of ShapeDtypeStruct."""
    module = family(config.model_type).module
    model = nnx.eval_shape(lambda: module(config, key=jax.random.key(0), dtype=dtype))
    return nnx.to_pure_dict(nnx.state(model))


def random(config: ModelConfig, dtype=jnp.bfloat16, shardings: dict | None = None) -> dict:
    """Creates random parameters of a model directly in their placement.

    Args:
        shardings: sharding of each array, a tree like `abstract`; None for the first device.
    """
    config = _padded(config, shardings)
    module = family(config.model_type).module

    def make():
        model = module(config, key=jax.random.key(0), dtype=dtype)
        return nnx.to_pure_dict(nnx.state(model))

    return jax.jit(make, out_shardings=shardings)()


def axes(config: ModelConfig) -> dict:
    """Returns the logical axes of the parameters: a tree like `abstract` of tuples of names.

    Modules name the axes of a parameter where they create it; those of blocks are stacked and
    begin with "layers".
    """
    module = family(config.model_type).module
    model = nnx.eval_shape(lambda: module(config, key=jax.random.key(0)))
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        stacked = ("layers",) if path[0] == "blocks" else ()
        found[tuple(map(str, path))] = (*stacked, *leaf.get_metadata()["axes"])
    return nest(found)


def shardings(
    config: ModelConfig, mesh: jax.sharding.Mesh, rules: sharding.Rules = sharding.RULES
) -> dict:
    """Returns the shardings of the parameters on a mesh, for `load`: a tree like `abstract`."""
    return sharding.shardings(axes(config), mesh, rules)


def _padded(config: ModelConfig, shardings: Mapping[str, Any] | None) -> ModelConfig:
    """Returns the configuration with the vocabulary padded as `shardings` require."""
    placed = None if shardings is None else shardings["embed"]["embedding"]
    if not isinstance(placed, jax.sharding.NamedSharding):
        return config
    axes = placed.spec[0] if placed.spec else None
    names = (axes,) if isinstance(axes, str) else axes or ()
    return sharding.padded(config, math.prod(placed.mesh.shape[name] for name in names))


def count(tree) -> int:
    """Returns the number of parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def parts(tree: Mapping[str, Any]) -> dict[str, dict]:
    """Splits an abstract parameter tree into the parts of a checkpoint, in stored order."""
    layers = jax.tree.leaves(tree["blocks"])[0].shape[0]
    block = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree["blocks"])
    return {
        "embed": {"embed": tree["embed"]},
        **{f"block_{layer:03d}": {"blocks": block} for layer in range(layers)},
        "final": {name: tree[name] for name in ("norm", "head") if name in tree},
    }


def is_converted(directory: str | os.PathLike) -> bool:
    """Returns True if a directory is a converted checkpoint, damaged or not."""
    return os.path.isfile(Path(directory) / "manifest.json")


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """Reads the manifest of a converted checkpoint and compares its tensors with config.json.

    Raises:
        CheckpointError: if it is missing, damaged or contradicts config.json.
        qwen_jax.config.ConfigError: if config.json cannot be used.
    """
    path = Path(directory) / "manifest.json"
    manifest = manifests.read(path)
    expected = {
        (part, keys): leaf.shape
        for part, subtree in parts(abstract(model_config(path.parent))).items()
        for keys, leaf in _leaves(subtree)
    }
    actual = {(tensor.part, tensor.path): tensor.shape for tensor in manifest.tensors}
    for key in sorted(expected.keys() | actual.keys()):
        if expected.get(key) != actual.get(key):
            raise CheckpointError(
                f"{path}: {'.'.join(key[1])} of {key[0]} has shape {actual.get(key)}, "
                f"config.json asks for {expected.get(key)}"
            )
    return manifest


def verify(
    directory: str | os.PathLike, *, full: bool = False, progress: Progress | None = None
) -> Manifest:
    """Checks a converted checkpoint against its manifest.

    The fast check covers the presence and size of every file and the checksums of
    small ones; the full check reads every file and every tensor. Processes of a job divide
    the files and tensors between them.

    Args:
        full: run the full check.
        progress: called with the bytes read so far and the bytes in all; by the full check only.

    Raises:
        CheckpointError: naming the first file or tensor that differs.
        qwen_jax.config.ConfigError: if config.json cannot be used.
    """
    directory = Path(directory)
    manifest = manifests.read(directory / "manifest.json")
    files = multihost.local_share(list(manifest.files)) if full else []
    own = dict(multihost.local_share(list(manifest.by_part().items()))) if full else {}
    total = sum(manifest.files[name].size for name in files)
    total += sum(tensor.num_bytes for tensors in own.values() for tensor in tensors)
    on_bytes = manifests.counter(progress if full else None, total)
    manifests.check_files(directory, manifest, full=frozenset(files), on_bytes=on_bytes)
    read_manifest(directory)
    for part, tensors in own.items():
        leaves = load_part(directory, part, tensors)
        for tensor in tensors:
            if manifests.array_sha256(tensor.to_source(leaves[tensor.path])) != tensor.sha256:
                raise CheckpointError(
                    f"{directory / 'params' / part}: {tensor.name} is damaged: "
                    "its SHA-256 is not the manifest's"
                )
            on_bytes(tensor.num_bytes)
    if full:
        multihost.await_all()
    return manifest


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*path, key))


def nest(leaves: Mapping[tuple[str, ...], Any]) -> dict:
    """Builds a nested dict from leaves by path."""
    tree: dict = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def save_part(
    directory: str | os.PathLike, part: str, leaves: Mapping[tuple[str, ...], np.ndarray]
) -> dict[str, File]:
    """Writes a part, reads it back, flushes it; returns its files, by path in the checkpoint.

    Leftovers of an interrupted attempt are removed first.

    Raises:
        CheckpointError: if it cannot be written, or reads back different.
    """
    directory = Path(directory).resolve()
    folder = directory / "params" / part
    with orbax_io.errors(f"{shown(folder)} cannot be written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    orbax_io.save(folder, nest(leaves), alone=True)
    target = {path: np.empty(array.shape, array.dtype) for path, array in leaves.items()}
    back = _restore(directory, part, target)
    for path, array in leaves.items():
        same = np.array_equal(manifests.array_bytes(array), manifests.array_bytes(back[path]))
        if not same:
            raise CheckpointError(f"{shown(folder)}: {'.'.join(path)} reads back different")
    with orbax_io.errors(f"{shown(folder)} cannot be written"):
        return orbax_io.flush(folder, directory)


def load_part(
    directory: str | os.PathLike, part: str, tensors: list[Tensor]
) -> dict[tuple[str, ...], np.ndarray]:
    """Loads the arrays of a part into host memory, by path.

    Raises:
        CheckpointError: if it cannot be read, or differs in shapes or dtypes from `tensors`.
    """
    target = {
        tensor.path: np.empty(tensor.shape, DTYPES[tensor.dtype])  # never touched: no memory
        for tensor in tensors
    }
    return _restore(directory, part, target)


def _restore(directory: str | os.PathLike, part: str, target: dict) -> dict:
    """Loads the arrays of a part, by path, to the host or to devices as in `target`."""
    folder = Path(directory).resolve() / "params" / part
    return dict(_leaves(orbax_io.load(folder, nest(target))))


def _return_freed() -> None:
    """Returns freed memory to the operating system.

    A part is read by many threads, for each of which glibc retains freed memory: together
    half the size of a model of a few GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack, layer, index):
    """Writes `layer` at `index` of the leading axis of `stack`, in place."""
    return jax.tree.map(
        lambda whole, one: jax.lax.dynamic_update_index_in_dim(
            whole, one.astype(whole.dtype), index, 0
        ),
        stack,
        layer,
    )


class Stack:
    """A parameter tree on its devices that is filled part by part.

    Needs memory for the parameters and one part.

    Args:
        config: configuration of the model, whose vocabulary is padded as `shardings` require.
        dtype: dtype of all arrays.
        shardings: sharding of each array, a tree like `abstract`; None for the first device.
    """

    def __init__(self, config: ModelConfig, dtype: Any, shardings: dict | None = None):
        tree = abstract(_padded(config, shardings), dtype)
        if shardings is None:
            first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: first, tree)
        self._shardings = dict(_leaves(shardings))
        self._missing = parts(tree)
        self._shapes = {
            path: leaf.shape for part in self._missing.values() for path, leaf in _leaves(part)
        }
        self._order = tuple(tree)
        stacked = {path: leaf for path, leaf in _leaves(tree) if path[0] == "blocks"}
        self._blocks = jax.jit(
            lambda: {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in stacked.items()},
            out_shardings={path: self._shardings[path] for path in stacked},
        )()
        self._rest: dict[tuple[str, ...], jax.Array] = {}

    def sharding(self, path: tuple[str, ...]) -> jax.sharding.Sharding:
        """Returns the sharding of an array of a part; a layer's has no layer axis."""
        sharding = self._shardings[path]
        if path[0] == "blocks" and isinstance(sharding, jax.sharding.NamedSharding):
            spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
            return jax.sharding.NamedSharding(sharding.mesh, spec)
        return sharding

    def build(
        self,
        path: tuple[str, ...],
        shape: tuple[int, ...],
        read: Callable[[tuple[slice, ...]], np.ndarray],
    ) -> jax.Array:
        """Builds an array of a part on its devices, reading only what those of this process hold.

        Rows that pad the vocabulary are zeros.

        Args:
            path: path of the array in the tree.
            shape: shape of the stored array, without padding.
            read: returns the part of the stored array at a tuple of slices, one for each axis.
        """
        if not self.takes(path, shape):
            read = sharding.with_zeros(shape, read)
        return sharding.build(self._shapes[path], self.sharding(path), read)

    def takes(self, path: tuple[str, ...], shape: tuple[int, ...]) -> bool:
        """Returns True if the array at `path` has this shape, so that no padding is needed."""
        return self._shapes[path] == tuple(shape)

    def put(self, part: str, leaves: Mapping[tuple[str, ...], jax.Array]) -> None:
        """Stores the arrays of a part, placed as `sharding`; they are cast to the tree's dtype.

        Raises:
            CheckpointError: if they are not the part's arrays, or it is there already.
        """
        expected = dict(_leaves(self._missing.pop(part, {})))
        if {path: leaf.shape for path, leaf in expected.items()} != {
            path: leaf.shape for path, leaf in leaves.items()
        }:
            raise CheckpointError(f"part {part} does not hold the arrays it should")
        if part.startswith("block_"):
            index = int(part.removeprefix("block_"))
            self._blocks = _write(self._blocks, dict(leaves), index)
        else:
            for path, leaf in leaves.items():
                self._rest[path] = leaf.astype(expected[path].dtype)

    def tree(self) -> dict:
        """Returns the filled tree.

        Raises:
            CheckpointError: if parts are missing.
        """
        if self._missing:
            raise CheckpointError(f"parts {', '.join(self._missing)} were not loaded")
        done = nest({**self._blocks, **self._rest})
        return {name: done[name] for name in self._order}


def stored_dtype(dtypes: Iterable[str]) -> np.dtype:
    """Returns the dtype that holds all of these: bfloat16 if all are, else float32."""
    return DTYPES["bfloat16" if set(dtypes) == {"bfloat16"} else "float32"]


_check = verify  # the name is an argument of `load`


@own_settings()
def load(
    directory: str | os.PathLike,
    *,
    dtype: Any = None,
    shardings: dict | None = None,
    verify: str = "fast",
    progress: Progress | None = None,
) -> dict:
    """Loads the parameters of a converted checkpoint: nested dicts of arrays like `abstract`.

    Args:
        dtype: dtype of all arrays; None for `stored_dtype`.
        shardings: sharding of each array, a tree like `abstract`; None for the first device.
        verify: "fast" or "full": the check of `verify` to run first.
        progress: called with the bytes loaded so far and the bytes in all.

    Raises:
        ValueError: if `verify` is neither.
        CheckpointError: if a file is missing or damaged.
        qwen_jax.config.ConfigError: if config.json cannot be used.
    """
    if verify not in ("fast", "full"):
        raise ValueError(f"{verify=} must be 'fast' or 'full'")
    manifest = _check(directory, full=verify == "full")
    dtype = stored_dtype(tensor.dtype for tensor in manifest.tensors) if dtype is None else dtype
    stack = Stack(model_config(Path(directory)), dtype, shardings)
    on_bytes = manifests.counter(progress, sum(tensor.num_bytes for tensor in manifest.tensors))
    for part, tensors in manifest.by_part().items():
        target = {
            tensor.path: jax.ShapeDtypeStruct(
                tensor.shape, DTYPES[tensor.dtype], sharding=stack.sharding(tensor.path)
            )
            if stack.takes(tensor.path, tensor.shape)
            else np.empty(tensor.shape, DTYPES[tensor.dtype])
            for tensor in tensors
        }
        leaves = _restore(directory, part, target)
        for path, leaf in leaves.items():
            if not stack.takes(path, leaf.shape):
                leaves[path] = stack.build(path, leaf.shape, leaf.__getitem__)
        stack.put(part, leaves)
        _return_freed()
        on_bytes(sum(tensor.num_bytes for tensor in tensors))
    return stack.tree()
