"""What clouds and schedulers call the devices of `devices.DEVICES`, and how many a host has.

Sources: hosts, machine types, labels and topologies of TPUs from
docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, accelerator types and topologies
of TPU VMs from docs.cloud.google.com/tpu/docs (pages v4, v5e, v5p and v6e), their runtime versions
from docs.cloud.google.com/tpu/docs/runtimes; the Cloud TPU API has no TPU7x
(docs.cloud.google.com/tpu/docs/reference/rest/v2alpha1/AcceleratorConfig). GPUs from
docs.cloud.google.com/compute/docs/accelerator-optimized-machines. Names of xpk from
xpk/core/system_characteristics.py of xpk 1.16.0.
"""

import dataclasses
import math

from qwen_jax.config import ConfigError
from qwen_jax.devices import Topology

_SQUARES = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()
_SMALL_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4".split()
# Of several topologies with as many chips, the one that an accelerator type means.
_TYPED_CUBES = [*_SMALL_CUBES, *"4x4x4 4x4x8 4x8x8 8x8x8".split()]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One kind of device as others name it; None where they have no such thing.

    Attributes:
        platform: as jax calls it.
        resource: of Kubernetes, a chip each.
        gke: value of the label `cloud.google.com/gke-tpu-accelerator` or `gke-accelerator`.
        machine: of the chips of a whole host, with their number as `{}` where there are several.
        per_host: chips of a host, of a slice of several hosts if TPUs.
        xpk: name before the topology of a TPU, before the number of GPUs.
        cores: counted by an accelerator type for each chip.
        vm: name of the accelerator type of a TPU VM before the number.
        runtime: software version of a TPU VM.
        ray: what Ray calls this TPU.
    """

    platform: str
    resource: str
    gke: str
    machine: str
    per_host: int
    xpk: str
    cores: int = 1
    vm: str | None = None
    runtime: str | None = None
    ray: str | None = None


def _tpu(gke: str, machine: str, name: str, runtime: str | None, cores: int, ray: str):
    return Accelerator(
        platform="tpu",
        resource="google.com/tpu",
        gke=gke,
        machine=machine,
        per_host=4,
        xpk=name,
        cores=cores,
        vm=name if runtime else None,
        runtime=runtime,
        ray=ray,
    )


def _gpu(gke: str, machine: str, name: str):
    return Accelerator(
        platform="gpu", resource="nvidia.com/gpu", gke=gke, machine=machine, per_host=8, xpk=name
    )


ACCELERATORS = {
    "v4": _tpu("tpu-v4-podslice", "ct4p-hightpu-4t", "v4", "tpu-ubuntu2204-base", 2, "v4"),
    "v5e": _tpu(
        "tpu-v5-lite-podslice",
        "ct5lp-hightpu-{}t",
        "v5litepod",
        "v2-alpha-tpuv5-lite",
        1,
        "v5litepod",
    ),
    "v5p": _tpu("tpu-v5p-slice", "ct5p-hightpu-4t", "v5p", "v2-alpha-tpuv5", 2, "v5p"),
    "v6e": _tpu("tpu-v6e-slice", "ct6e-standard-{}t", "v6e", "v2-alpha-tpuv6e", 1, "v6e"),
    "tpu7x": _tpu("tpu7x", "tpu7x-standard-4t", "tpu7x", None, 2, "v7x"),
    "h100": _gpu("nvidia-h100-80gb", "a3-highgpu-8g", "h100-80gb"),
    "h200": _gpu("nvidia-h200-141gb", "a3-ultragpu-8g", "h200-141gb"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Hosts:
    """Machines that hold a topology.

    Attributes:
        accelerator: what their chips are.
        sides: chips along each side, as `4x4`; the number of GPUs.
        count: machines, each with one process.
        chips: of each.
    """

    accelerator: Accelerator
    sides: str
    count: int
    chips: int

    @property
    def machine(self) -> str:
        """Machine type on Google Cloud."""
        return self.accelerator.machine.format(self.chips)

    @property
    def vm_type(self) -> str:
        """Accelerator type of a TPU VM.

        Raises:
            ConfigError: if there is none, or it means another topology.
        """
        if self.accelerator.vm is None:
            raise ConfigError("gcloud rents v4, v5e, v5p and v6e: take jobset or xpk for others")
        chips = self.count * self.chips
        meant = [each for each in _TYPED_CUBES if math.prod(map(int, each.split("x"))) == chips]
        name = f"{self.accelerator.vm}-{chips * self.accelerator.cores}"
        if self.sides.count("x") == 2 and self.sides not in meant:
            is_what = f"is {meant[0]}, not {self.sides}" if meant else "has no one topology"
            raise ConfigError(
                f"gcloud rents accelerator types, of which {name} {is_what}: take one of "
                f"{', '.join(_TYPED_CUBES)}, or jobset"
            )
        return name


def hosts(topology: Topology, *, whole: bool = True) -> Hosts:
    """The machines of a topology.

    Args:
        whole: whether 8 chips of v5e or v6e are one machine; xpk makes them two.

    Raises:
        ConfigError: if nobody rents such devices, or not in this number.
    """
    kind, sides = topology.name.split(":")
    if kind not in ACCELERATORS:
        raise ConfigError(
            f"topology {topology.name!r}: jobs run on one of {', '.join(ACCELERATORS)}"
        )
    accelerator = ACCELERATORS[kind]
    numbers = [int(side) for side in sides.split("x")]
    chips = math.prod(numbers)
    if accelerator.platform == "gpu":
        per_host = accelerator.per_host
        if chips > per_host and chips % per_host:
            raise ConfigError(
                f"topology {topology.name!r}: several hosts have {per_host} GPUs each, so take "
                f"{chips // per_host * per_host} or {-(-chips // per_host) * per_host}"
            )
        return Hosts(accelerator, sides, -(-chips // per_host), min(chips, per_host))
    if len(numbers) == 2:
        if sides not in _SQUARES:
            raise ConfigError(f"topology {topology.name!r}: {kind} has {', '.join(_SQUARES)}")
        per_host = 8 if chips == 8 and whole else accelerator.per_host
    else:
        if sides not in _SMALL_CUBES and any(side % 4 for side in numbers):
            raise ConfigError(
                f"topology {topology.name!r}: {kind} has {', '.join(_SMALL_CUBES)} and "
                "those of which every side is a multiple of 4"
            )
        per_host = accelerator.per_host
    return Hosts(accelerator, sides, -(-chips // per_host), min(chips, per_host))
