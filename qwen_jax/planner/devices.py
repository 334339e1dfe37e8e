"""Device kinds with their published figures, names of topologies, and devices of JAX.

Sources: FLOP/s, bandwidths and links of TPUs from docs.cloud.google.com/tpu/docs (pages v4, v5e,
v5p, v6e and tpu7x; half of a bidirectional figure is one way); their memory is what libtpu 0.0.52
names as available when it refuses a larger program, a little under the published 32, 16, 95, 32
and 192 GiB a chip. Topologies of TPUs are those of
docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. GPUs are as in NVIDIA's data
sheets, dense, with NVLink or else PCIe: SXM versions of A100, H100, H200 and B200 (HGX), the
Workstation edition of RTX PRO 6000 Blackwell.
"""

import difflib
import glob
import itertools
import math
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen_jax.config import ConfigError
from qwen_jax.files.reading import printable

_GIB, _GB = 2**30, 10**9

SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""Two-dimensional TPU topologies."""
SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
"""Three-dimensional TPU topologies, beside those with multiples of 4 along each side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Device kind, with figures per JAX device; None for figures that are not published.

    Attributes:
        platform: platform as in JAX: "cpu", "gpu" or "tpu".
        memory: bytes available to programs and their data; None for a share of the host's.
        flops: peak bfloat16 FLOP/s.
        bandwidth: memory bandwidth in bytes/s.
        links: bandwidth to other devices in bytes/s, over all links, one way.
        per_chip: JAX devices per chip of the topology.
        per_host: chips per host, where a topology spans several hosts.
        dims: number of sides in the topology's name.
        cores: cores per chip in the count of an accelerator type such as v5p-8.
        relays: whether its compiler (libtpu 0.0.52) copies the matrices of a loop over layers
            into another layout in every step.
        kinds: names in JAX (`device_kind`).
        others: other names that users write.
    """

    platform: str
    memory: int | None = None
    flops: float | None = None
    bandwidth: float | None = None
    links: float | None = None
    per_chip: int = 1
    per_host: int = 8
    dims: int = 1
    cores: int = 1
    relays: bool = False
    kinds: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def _tpu(
    gib: float, flops: float, bandwidth: float, links: float, *kinds: str, **more: Any
) -> Device:
    return Device(
        platform="tpu",
        memory=int(gib * _GIB),
        flops=flops,
        bandwidth=bandwidth,
        links=links,
        per_host=4,
        kinds=kinds,
        **more,
    )


def _gpu(
    gb: int, flops: float | None, bandwidth: float, links: float, *kinds: str, **more: Any
) -> Device:
    return Device(
        platform="gpu",
        memory=gb * _GB,
        flops=flops,
        bandwidth=bandwidth,
        links=links,
        kinds=kinds,
        **more,
    )


_PCIE4, _PCIE5 = 32e9, 64e9
DEVICES = {
    # Two cores of a v4 or v5p chip are one device, those of a tpu7x chip are two.
    "v4": _tpu(30.75, 275e12, 1.2e12, 300e9, "TPU v4", dims=3, cores=2),
    "v5e": _tpu(
        15.75,
        197e12,
        819e9,
        200e9,
        "TPU v5 lite",
        "TPU v5e",
        dims=2,
        others=("v5lite", "v5litepod"),
    ),
    "v5p": _tpu(95.73, 459e12, 2.765e12, 600e9, "TPU v5", "TPU v5p", dims=3, cores=2),
    "v6e": _tpu(
        31.24, 918e12, 1.638e12, 400e9, "TPU v6 lite", "TPU v6e", dims=2, others=("trillium",)
    ),
    "tpu7x": _tpu(
        94.74,
        1153.5e12,
        3.69e12,
        300e9,
        "TPU7x",
        dims=3,
        cores=2,
        per_chip=2,
        relays=True,
        others=("v7x", "7x", "ironwood"),
    ),
    "a100-40": _gpu(
        40,
        312e12,
        1.555e12,
        300e9,
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-PCIE-40GB",
        others=("a100-40gb",),
    ),
    "a100-80": _gpu(
        80,
        312e12,
        2.039e12,
        300e9,
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A100 80GB PCIe",
        others=("a100-80gb",),
    ),
    "l4": _gpu(24, 121e12, 300e9, _PCIE4, "NVIDIA L4"),
    "l40": _gpu(48, 181.05e12, 864e9, _PCIE4, "NVIDIA L40"),
    "l40s": _gpu(48, 362.05e12, 864e9, _PCIE4, "NVIDIA L40S"),
    "rtx6000ada": _gpu(48, None, 960e9, _PCIE4, "NVIDIA RTX 6000 Ada Generation"),
    "h100": _gpu(80, 989.5e12, 3.35e12, 450e9, "NVIDIA H100 80GB HBM3", others=("h100-80gb",)),
    "h100nvl": _gpu(94, 835.5e12, 3.9e12, 300e9, "NVIDIA H100 NVL"),
    "h200": _gpu(141, 989.5e12, 4.8e12, 450e9, "NVIDIA H200", others=("h200-141gb",)),
    "h200nvl": _gpu(141, 835.5e12, 4.8e12, 450e9, "NVIDIA H200 NVL"),
    "gh200": _gpu(96, 989.5e12, 4e12, 450e9, "NVIDIA GH200 480GB", per_host=1),
    "b200": _gpu(180, 2250e12, 8e12, 900e9, "NVIDIA B200"),
    "gb200": _gpu(186, 2500e12, 8e12, 900e9, "NVIDIA GB200", per_host=4),
    "rtxpro6000": _gpu(
        96,
        503.8e12,
        1.792e12,
        _PCIE5,
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        others=("rtx6000pro", "rtxpro6000blackwell"),
    ),
    "gpu": Device(platform="gpu"),  # of any other kind, with its memory said
    "cpu": Device(platform="cpu"),
}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia")


_NAMES = {_plain(name): kind for kind, device in DEVICES.items() for name in (kind, *device.others)}


@dataclass(frozen=True, slots=True)
class Topology:
    """Topology: devices of one kind that are connected.

    Attributes:
        name: kind and chips along each side, such as `v5e:4x4`.
        kind: key of `DEVICES`.
        sides: chips along each side.
    """

    name: str
    kind: str
    sides: tuple[int, ...]

    @property
    def device(self) -> Device:
        return DEVICES[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def count(self) -> int:
        """Number of JAX devices."""
        return self.chips * self.device.per_chip


def topology(name: str) -> Topology:
    """Parses the name of a topology.

    A name is a kind, a colon and the chips along each side, such as `v5e:4x4`, `tpu7x:2x2x1`,
    `h200:8` or `cpu:8`; an accelerator type of Google Cloud, such as `v5litepod-16` or `v5p-8`;
    or a kind alone for one device. Case and hyphens are ignored.

    Raises:
        ConfigError: if the name is unknown, or there is no such topology.
    """
    text = name.strip().lower()
    match = re.fullmatch(r"(.+?)([:-])([0-9]{1,5}(?:x[0-9]{1,5})*)", text)
    if _plain(text) in _NAMES or match is None:
        kind, separator, size = text, "", ""
    else:
        kind, separator, size = match.groups()
    if _plain(kind) not in _NAMES:
        raise ConfigError(f"topology {printable(name)!r}: there is no {_unknown(kind)}")
    kind = _NAMES[_plain(kind)]
    device = DEVICES[kind]
    numbers = [int(side) for side in size.split("x")] if size else []
    if separator == "-" and len(numbers) == 1:
        if device.platform != "tpu":
            raise ConfigError(f"topology {name!r}: did you mean {kind}:{size}?")
        chips, rest = divmod(numbers[0], device.cores)
        sides = None if rest else _together(device, chips)
        if sides is None:
            types = ", ".join(f"{kind}-{device.cores * math.prod(each)}" for each in _some(device))
            raise ConfigError(f"topology {name!r}: {kind} has {types} and larger ones")
    elif len(numbers) == 1 and device.dims == 2:
        sides = _together(device, numbers[0]) or (0, 0)
    else:
        sides = tuple(numbers) if numbers else (1,) * device.dims
    _check(name, kind, device, sides)
    return _topology(kind, sides)


def larger(topology: Topology) -> Iterator[Topology]:
    """Yields topologies of the same kind with 2, 4, 8, ... times as many chips."""
    chips, device = 2 * topology.chips, topology.device
    while chips <= 1 << 14 and (sides := _together(device, chips)) is not None:
        yield _topology(topology.kind, sides)
        chips *= 2


def _topology(kind: str, sides: tuple[int, ...]) -> Topology:
    return Topology(f"{kind}:{'x'.join(map(str, sides))}", kind, sides)


def _together(device: Device, chips: int) -> tuple[int, ...] | None:
    """Returns the sides of a topology of `chips` chips, as on Google Cloud; None if none exists."""
    if device.dims == 1:
        is_whole = chips <= device.per_host or chips % device.per_host == 0
        return (chips,) if is_whole or device.platform == "cpu" else None
    return next((each for each in _some(device) if math.prod(each) == chips), None)


def _some(device: Device) -> list[tuple[int, ...]]:
    """Returns the sides of TPU topologies, smallest first; large cubes by powers of two only."""
    names = SQUARES if device.dims == 2 else SMALL_CUBES
    found = [tuple(map(int, each.split("x"))) for each in names]
    if device.dims == 3:
        sides = [4, 4, 4]
        for axis in itertools.islice(itertools.cycle((2, 1, 0)), 9):
            found.append(tuple(sides))
            sides[axis] *= 2
    return found


def _check(name: str, kind: str, device: Device, sides: tuple[int, ...]) -> None:
    """Checks that a topology of a kind has these sides.

    Raises:
        ConfigError: naming the possible ones.
    """
    chips = math.prod(sides)
    if len(sides) != device.dims:
        example = _topology(kind, _some(device)[1] if device.dims > 1 else (8,)).name
        raise ConfigError(
            f"topology {name!r} must give {device.dims} sides of {kind}, such as {example}"
        )
    if device.dims == 1:
        most = device.per_host
        if not chips:
            raise ConfigError(f"topology {name!r} must have at least one device")
        if _together(device, chips) is None:
            raise ConfigError(
                f"topology {name!r}: several hosts have {most} GPUs each, so take "
                f"{chips // most * most} or {-(-chips // most) * most}"
            )
    elif device.dims == 2 and "x".join(map(str, sides)) not in SQUARES:
        raise ConfigError(f"topology {name!r}: {kind} has {', '.join(SQUARES)}")
    elif device.dims == 3 and not (
        "x".join(map(str, sides)) in SMALL_CUBES or all(side and side % 4 == 0 for side in sides)
    ):
        raise ConfigError(
            f"topology {name!r}: {kind} has {', '.join(SMALL_CUBES)} and "
            "those of which every side is a multiple of 4"
        )


def _unknown(kind: str) -> str:
    """Builds the error for an unknown kind, with similar names."""
    near = [each for each in DEVICES if _plain(kind) and _plain(each).startswith(_plain(kind))]
    similar = difflib.get_close_matches(_plain(kind), _NAMES, n=3)
    near = near or list(dict.fromkeys(_NAMES[each] for each in similar))
    asked = f"; did you mean {' or '.join(near)}?" if near else ";"
    return (
        f"{printable(kind, 40)!r}{asked} There are {', '.join(DEVICES)}, with a colon and the "
        "number of chips along each side, such as v5e:4x4, v5p:2x2x1 or h200:8; gpu:8 with its "
        "--memory is any other"
    )


def present(platform: str) -> bool:
    """Returns True if the system has device files of a platform, "gpu" or "tpu"."""
    names = {"tpu": ("/dev/accel*", "/dev/vfio/[0-9]*"), "gpu": ("/dev/nvidia[0-9]*",)}
    return any(glob.glob(name) for name in names[platform])


def quiet_libtpu() -> None:
    """Keeps libtpu, if it is installed on a machine without a TPU, from probing and logging.

    Must be called before JAX looks for devices. Variables that are set already are kept.
    """
    if not present("tpu"):
        for name, value in _WITHOUT_TPU.items():
            os.environ.setdefault(name, value)


_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",  # else /tmp/tpu_logs, which may be another user's
}


def found() -> list[Any]:
    """Returns the devices that JAX finds.

    Raises:
        ConfigError: if there are none, for example because of JAX_PLATFORMS.
    """
    import jax

    quiet_libtpu()
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for cuda without its plugin
        asked = os.environ.get("JAX_PLATFORMS")
        reason = printable((str(error).splitlines() or ["it is not installed"])[0])
        if asked:
            reason = reason.split(" (set JAX_PLATFORMS")[0].rstrip(".")
            raise ConfigError(
                f"JAX_PLATFORMS={printable(asked)} names what is not here: {reason}; unset it, or "
                "set it to cpu"
            ) from None
        raise ConfigError(f"jax finds no device: {reason}") from None


def host_bytes() -> int:
    """Returns the memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory(device: Any, *, share: int = 1) -> int | None:
    """Returns the bytes that programs and their data may use on a JAX device; None if unknown.

    Args:
        share: number of CPU devices that divide the memory of this machine.
    """
    if device.platform == "cpu":
        return host_bytes() // share
    return (device.memory_stats() or {}).get("bytes_limit")


def relays(device: Any) -> bool:
    """Returns `Device.relays` for a JAX device."""
    return any(each.relays and device.device_kind in each.kinds for each in DEVICES.values())


def peak_bytes() -> int:
    """Returns the peak memory so far in bytes: of the fullest device, or of this process on CPU."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    most = max(each.get("peak_bytes_in_use", 0) for each in stats)
    return most or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
