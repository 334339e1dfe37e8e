"""What devices offer, as published, and topologies of them.

Sources: FLOP/s, bandwidths and links of TPUs from docs.cloud.google.com/tpu/docs (pages v4, v5e,
v5p, v6e and tpu7x; half of a bidirectional figure is one way); their memory is what libtpu 0.0.52
names as available when it refuses a larger program, a little under the published 32, 16, 95, 32
and 192 GiB a chip. H100 and H200 are the SXM versions of NVIDIA's data sheets, dense.
"""

import dataclasses
import math
import os
import re
import resource
from typing import Any

from qwen_jax.config import ConfigError

_GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device as jax counts them; None where nobody publishes a figure.

    Attributes:
        platform: as jax calls it.
        memory: bytes that programs and their data may take; None for a share of the host's.
        flops: peak bfloat16 FLOP/s.
        bandwidth: bytes/s of that memory.
        links: bytes/s to other devices, over all links, one way.
        per_chip: devices a chip of the topology.
        dims: numbers in the topology's name.
        relays: whether its compiler (libtpu 0.0.52) copies the matrices that a loop over layers
            multiplies with, to lay them out otherwise, in every step.
        kinds: names that jax has for it (`device_kind`).
    """

    platform: str
    memory: int | None = None
    flops: float | None = None
    bandwidth: float | None = None
    links: float | None = None
    per_chip: int = 1
    dims: int = 1
    relays: bool = False
    kinds: tuple[str, ...] = ()


def _tpu(gib: float, flops: float, bandwidth: float, links: float, **more: Any) -> Device:
    return Device(
        platform="tpu",
        memory=int(gib * _GIB),
        flops=flops,
        bandwidth=bandwidth,
        links=links,
        **more,
    )


DEVICES = {
    # Two cores of a v4 or v5p chip are one device, those of a tpu7x chip are two.
    "v4": _tpu(30.75, 275e12, 1.2e12, 300e9, dims=3),
    "v5e": _tpu(15.75, 197e12, 819e9, 200e9, dims=2),
    "v5p": _tpu(95.73, 459e12, 2.765e12, 600e9, dims=3),
    "v6e": _tpu(31.24, 918e12, 1.638e12, 400e9, dims=2),
    "tpu7x": _tpu(
        94.74, 1153.5e12, 3.69e12, 300e9, dims=3, per_chip=2, relays=True, kinds=("TPU7x",)
    ),
    "h100": Device(
        platform="gpu", memory=80 * 10**9, flops=989.5e12, bandwidth=3.35e12, links=450e9
    ),
    "h200": Device(
        platform="gpu", memory=141 * 10**9, flops=989.5e12, bandwidth=4.8e12, links=450e9
    ),
    "cpu": Device(platform="cpu"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    """Devices of one kind.

    Attributes:
        name: as it was given, such as `v5e:4x4`.
        kind: key of `DEVICES`.
        count: devices as jax counts them.
    """

    name: str
    kind: str
    count: int

    @property
    def device(self) -> Device:
        return DEVICES[self.kind]


def topology(name: str) -> Topology:
    """The devices that a name such as `v5e:4x4`, `tpu7x:2x2x1`, `h200:8` or `cpu:8` means.

    Raises:
        ConfigError: if it means none.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d{0,3}(?:x[1-9]\d{0,3})*)", name)
    if match is None or match[1] not in DEVICES:
        raise ConfigError(
            f"topology {name!r} must be one of {', '.join(DEVICES)}, a colon and the number of "
            "chips along each side, such as v5e:4x4, v5p:2x2x1 or h200:8"
        )
    kind, sides = match[1], [int(side) for side in match[2].split("x")]
    device = DEVICES[kind]
    if len(sides) != device.dims:
        example = f"{kind}:{'x'.join('221'[: device.dims])}" if device.dims > 1 else f"{kind}:8"
        raise ConfigError(
            f"topology {name!r} must give {device.dims} sides of {kind}, such as {example}"
        )
    return Topology(name, kind, math.prod(sides) * device.per_chip)


def host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory(device: Any, *, share: int = 1) -> int | None:
    """Bytes that programs and their data may take on a device of jax; None if it does not say.

    Args:
        share: devices that the memory of this machine is for, if they are CPUs.
    """
    if device.platform == "cpu":
        return host_bytes() // share
    return (device.memory_stats() or {}).get("bytes_limit")


def relays(device: Any) -> bool:
    """Whether programs on a device of jax lay out matrices anew (`Device.relays`)."""
    return any(each.relays and device.device_kind in each.kinds for each in DEVICES.values())


def peak_bytes() -> int:
    """The most memory in use so far: of the fullest device, or of this process on a CPU."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    most = max(each.get("peak_bytes_in_use", 0) for each in stats)
    return most or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
