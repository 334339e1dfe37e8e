"""Sharding: rules from logical axes to mesh axes, shapes of meshes, placement of arrays.

A mesh has three axes, any of which may be 1:

    data      independent requests
    seq       the tokens of every page of the cache, and those of a slice
    tensor    heads, the MLP and the vocabulary
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from qwen_jax.config import ConfigError, ModelConfig

AXES = ("data", "seq", "tensor")
"""Axes of every mesh, from the slowest links to the fastest."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Mesh axis of each logical axis of an array; None replicates it on every device."""

    layers: str | None = None
    vocab: str | None = "tensor"
    embed: str | None = None
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    mlp: str | None = "tensor"
    requests: str | None = "data"
    tokens: str | None = "seq"
    pages: tuple[str, ...] | str | None = "data"
    page: str | None = "seq"

    def spec(self, axes: Sequence[str]) -> PartitionSpec:
        """Returns the partition spec of an array with these logical axes.

        Raises:
            ValueError: if one mesh axis would divide two of them.
        """
        placed = [getattr(self, axis) for axis in axes]
        used = [name for entry in placed for name in _names(entry)]
        if len(set(used)) != len(used):
            raise ValueError(f"{axes} would put one mesh axis on two dimensions: {placed}")
        return PartitionSpec(*placed)


RULES = Rules()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """Number of devices along each axis of a mesh.

    Raises:
        ConfigError: if one is under 1.
    """

    data: int = 1
    seq: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ConfigError(f"mesh {axis}={getattr(self, axis)} must be at least 1")

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES[1:]) + (
            f",data={self.data}" if self.data > 1 else ""
        )

    @property
    def size(self) -> int:
        """Total number of devices."""
        return self.data * self.seq * self.tensor

    def shard(self, shape: Sequence[int], axes: Sequence[str], rules: Rules = RULES) -> list[int]:
        """Returns the shape of an array's largest part on a device; sizes need not divide."""
        spec = rules.spec(axes)
        parts = [math.prod(getattr(self, name) for name in _names(entry)) for entry in spec]
        return [-(-size // part) for size, part in zip(shape, parts, strict=True)]


def _names(entry: tuple[str, ...] | str | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry


def parse(text: str) -> MeshShape:
    """Parses a mesh shape such as `seq=4,tensor=4`; axes left out are 1.

    Raises:
        ConfigError: if the text is malformed.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        match = re.fullmatch(r"(\w+)=(\d{1,6})", item.strip())
        if match is None or match[1] not in AXES or match[1] in sizes:
            raise ConfigError(
                f"mesh {text!r} must look like seq=4,tensor=4: "
                f"each of {', '.join(AXES)} at most once, with a number"
            )
        sizes[match[1]] = int(match[2])
    return MeshShape(**sizes)


def divided(config: ModelConfig) -> dict[str, int]:
    """Returns the sizes that `tensor` must divide, by field of the configuration."""
    return {name: getattr(config, name) for name in ("num_heads", "num_kv_heads", "mlp_dim")}


def padded(config: ModelConfig, tensor: int) -> ModelConfig:
    """Returns the configuration with the vocabulary padded to a multiple of `tensor`."""
    return dataclasses.replace(config, vocab_padding=-config.vocab_size % tensor)


def default_mesh(config: ModelConfig, count: int) -> MeshShape:
    """Returns the default mesh shape of a model on `count` devices.

    `tensor` is the largest divisor of the device count that divides the query heads, the
    key/value heads and the MLP; heads are never replicated, and the vocabulary is padded. The
    remaining factor goes to `seq`, which divides no dimension of the model.
    """
    common = math.gcd(count, *divided(config).values())
    return MeshShape(seq=count // common, tensor=common)


def check(config: ModelConfig, shape: MeshShape, count: int) -> None:
    """Checks that a model can be sharded over a mesh.

    Raises:
        ConfigError: if the mesh does not have `count` devices, or `tensor` does not divide a
            size of `divided`.
    """
    if shape.size != count:
        raise ConfigError(
            f"mesh {shape} has {shape.size} devices, there are {count}: "
            f"this model would take {default_mesh(config, count)}"
        )
    for name, size in divided(config).items():
        if size % shape.tensor:
            raise ConfigError(
                f"mesh {shape}: tensor={shape.tensor} does not divide {name}={size}: "
                f"this model would take {default_mesh(config, count)}"
            )


def make_mesh(
    devices: Sequence[Any] | None = None, *, data: int = 1, seq: int = 1, tensor: int = 1
) -> Mesh:
    """Creates a mesh; all meshes are created here.

    Axes are of type Auto: the compiler propagates shardings through the model, which states
    only those of weights, cache and inputs.

    Args:
        devices: devices of the mesh, ordered by the topology of their links; None for all
            devices of `jax.devices()`.
        data: number of replicas.
        seq: devices that divide the tokens of pages and slices.
        tensor: devices that divide heads, MLP and vocabulary.

    Raises:
        ConfigError: if the number of devices is not that of the mesh.
    """
    devices = jax.devices() if devices is None else devices
    shape = MeshShape(data=data, seq=seq, tensor=tensor)
    if len(devices) != shape.size:
        raise ConfigError(f"mesh {shape} has {shape.size} devices, there are {len(devices)}")
    sizes = [getattr(shape, axis) for axis in AXES]
    # Along the links of a TPU; an axis may need a part of one side of its topology.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def put(tree: Any, placement: Sharding) -> Any:
    """Puts a tree of host arrays on devices; every process must pass the same values.

    Nothing is sent between processes: each fills its own devices.
    """
    if placement.is_fully_addressable:
        return jax.device_put(tree, placement)

    def place(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, placement, lambda index: array[index])

    return jax.tree.map(place, tree)


def build(
    shape: Sequence[int],
    placement: Sharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """Builds a sharded array, of which each process reads only the part of its own devices.

    Args:
        shape: shape of the whole array.
        placement: sharding of the array, also over devices of other processes.
        read: returns the part of the array at a tuple of slices, one for each axis.
    """
    shape = tuple(shape)

    def bounds(index: tuple[slice, ...]) -> list[tuple[int, int]]:
        found = (each.indices(size) for each, size in zip(index, shape, strict=True))
        return [(start, stop) for start, stop, _ in found]

    held = placement.addressable_devices_indices_map(shape).values()
    ends = np.array([bounds(index) for index in held if index is not None])
    first, last = ends[..., 0].min(0).tolist(), ends[..., 1].max(0).tolist()
    part = read(tuple(map(slice, first, last)))

    def at(index) -> np.ndarray:
        own = zip(bounds(index), first, strict=True)
        return part[tuple(slice(start - begin, stop - begin) for (start, stop), begin in own)]

    return jax.make_array_from_callback(shape, placement, at)


def with_zeros(
    shape: Sequence[int], read: Callable[[tuple[slice, ...]], np.ndarray]
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Wraps `read`, which reads slices of an array of this shape, to return zeros beyond it."""

    def reading(index: tuple[slice, ...]) -> np.ndarray:
        starts = [min(each.start, size - 1) for each, size in zip(index, shape, strict=True)]
        stops = [min(each.stop, size) for each, size in zip(index, shape, strict=True)]
        part = read(tuple(map(slice, starts, stops)))
        whole = np.zeros([each.stop - each.start for each in index], part.dtype)
        part = part[
            tuple(slice(each.start - low, None) for each, low in zip(index, starts, strict=True))
        ]
        whole[tuple(map(slice, part.shape))] = part
        return whole

    return reading


def shardings(axes: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES) -> dict[str, Any]:
    """Maps a tree of tuples of logical axes to a tree of shardings on a mesh."""
    return {
        key: shardings(value, mesh, rules)
        if isinstance(value, Mapping)
        else NamedSharding(mesh, rules.spec(value))
        for key, value in axes.items()
    }
