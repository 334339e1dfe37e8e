"""Rules: meaning of an axis -> mesh axis; MeshShape, make_mesh, and the mesh of a model.

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
    """Mesh axis for each axis of an array, by meaning; None keeps it whole on every device."""

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
        """Where an array with these axes lies.

        Raises:
            ValueError: if one mesh axis would split two of them.
        """
        placed = [getattr(self, axis) for axis in axes]
        used = [name for entry in placed for name in _names(entry)]
        if len(set(used)) != len(used):
            raise ValueError(f"{axes} would put one mesh axis on two dimensions: {placed}")
        return PartitionSpec(*placed)


RULES = Rules()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """Devices along each axis of a mesh.

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
        """Devices in all."""
        return self.data * self.seq * self.tensor

    def shard(self, shape: Sequence[int], axes: Sequence[str], rules: Rules = RULES) -> list[int]:
        """The largest part of an array on a device; axes need not divide."""
        spec = rules.spec(axes)
        parts = [math.prod(getattr(self, name) for name in _names(entry)) for entry in spec]
        return [-(-size // part) for size, part in zip(shape, parts, strict=True)]


def _names(entry: tuple[str, ...] | str | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry


def parse(text: str) -> MeshShape:
    """The mesh that a flag says, such as `seq=4,tensor=4`; axes left out are 1.

    Raises:
        ConfigError: if it says no mesh.
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
    """Sizes that `tensor` divides, by the fields of the configuration."""
    return {name: getattr(config, name) for name in ("num_heads", "num_kv_heads", "mlp_dim")}


def padded(config: ModelConfig, tensor: int) -> ModelConfig:
    """The configuration of arrays on devices, whose vocabulary `tensor` divides by padding."""
    return dataclasses.replace(config, vocab_padding=-config.vocab_size % tensor)


def default_mesh(config: ModelConfig, count: int) -> MeshShape:
    """The mesh of a model on so many devices.

    `tensor` is the largest divisor of the device count that divides the query heads, the
    key/value heads and the MLP; heads are never replicated, and the vocabulary is padded. What
    is left of the devices goes to `seq`, which divides nothing of the model.
    """
    common = math.gcd(count, *divided(config).values())
    return MeshShape(seq=count // common, tensor=common)


def check(config: ModelConfig, shape: MeshShape, count: int) -> None:
    """Refuses a mesh that a model cannot be split over.

    Raises:
        ConfigError: if it is not one of `count` devices, or `tensor` divides not all it must.
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
    """The one place that makes meshes.

    Axes are of type Auto: the compiler spreads placements through the model, which states
    only those of weights, cache and inputs.

    Args:
        devices: all of the mesh, those with fast links nearby; None for all of this process.

    Raises:
        ConfigError: if they are not as many as the mesh has.
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
    """Host arrays on devices, those of other processes too, which put the same there.

    Nothing is sent between processes: each fills the devices that it has.
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
    """An array on devices, those of other processes too, from what goes to those of this one.

    Args:
        read: gives what lies between the starts and stops of a slice for each axis.
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
    """As `read`, which gives slices of an array of this shape, with zeros beyond its ends."""

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
    """A tree like `axes`, whose leaves name the axes of arrays, with their placements."""
    return {
        key: shardings(value, mesh, rules)
        if isinstance(value, Mapping)
        else NamedSharding(mesh, rules.spec(value))
        for key, value in axes.items()
    }
