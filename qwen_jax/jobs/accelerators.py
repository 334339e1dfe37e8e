"""Names of `devices.DEVICES` in clouds and schedulers, and numbers of chips per host.

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
from typing import NamedTuple

from qwen_jax.config import ConfigError
from qwen_jax.planner.devices import DEVICES, SMALL_CUBES, Topology

# Of several topologies with as many chips, the one that an accelerator type means.
_TYPED_CUBES = [*SMALL_CUBES, *"4x4x4 4x4x8 4x8x8 8x8x8".split()]


class Accelerator(NamedTuple):
    """Names of one device kind; None where a cloud or scheduler does not have it.

    Attributes:
        gke: value of the label `cloud.google.com/gke-tpu-accelerator` or `gke-accelerator`.
        machine: machine type of a whole host, with `{}` for its number of chips if it varies.
        xpk: name before the topology of a TPU, or before the number of GPUs.
        vm: accelerator type of a TPU VM, without the number.
        runtime: software version of a TPU VM.
        ray: name of the TPU in Ray.
    """

    gke: str | None = None
    machine: str | None = None
    xpk: str | None = None
    vm: str | None = None
    runtime: str | None = None
    ray: str | None = None


_V5E = "v5litepod"
_ACCELERATORS = {
    "v4": Accelerator(
        "tpu-v4-podslice", "ct4p-hightpu-4t", "v4", "v4", "tpu-ubuntu2204-base", "v4"
    ),
    "v5e": Accelerator(
        "tpu-v5-lite-podslice", "ct5lp-hightpu-{}t", _V5E, _V5E, "v2-alpha-tpuv5-lite", _V5E
    ),
    "v5p": Accelerator("tpu-v5p-slice", "ct5p-hightpu-4t", "v5p", "v5p", "v2-alpha-tpuv5", "v5p"),
    "v6e": Accelerator(
        "tpu-v6e-slice", "ct6e-standard-{}t", "v6e", "v6e", "v2-alpha-tpuv6e", "v6e"
    ),
    "tpu7x": Accelerator("tpu7x", "tpu7x-standard-4t", "tpu7x", ray="v7x"),
    "a100-40": Accelerator("nvidia-tesla-a100", "a2-highgpu-{}g"),
    "a100-80": Accelerator("nvidia-a100-80gb", "a2-ultragpu-{}g"),
    "l4": Accelerator("nvidia-l4"),
    "h100": Accelerator("nvidia-h100-80gb", "a3-highgpu-8g", "h100-80gb"),
    "h200": Accelerator("nvidia-h200-141gb", "a3-ultragpu-8g", "h200-141gb"),
    "b200": Accelerator("nvidia-b200", "a4-highgpu-8g"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Hosts:
    """Machines that hold a topology.

    Attributes:
        topology: topology of the devices.
        count: number of machines, each with one process.
        chips: number of chips per machine.
    """

    topology: Topology
    count: int
    chips: int

    @property
    def accelerator(self) -> Accelerator:
        return _ACCELERATORS.get(self.topology.kind, Accelerator())

    @property
    def is_tpu(self) -> bool:
        return self.topology.device.platform == "tpu"

    @property
    def resource(self) -> str:
        """Kubernetes resource name of a chip."""
        return "google.com/tpu" if self.is_tpu else "nvidia.com/gpu"

    @property
    def sides(self) -> str:
        """Chips along each side, such as `4x4`; for GPUs their number."""
        return "x".join(map(str, self.topology.sides))

    @property
    def machine(self) -> str | None:
        """Machine type on Google Cloud."""
        return self.accelerator.machine and self.accelerator.machine.format(self.chips)

    def named(self, field: str, who: str) -> str:
        """Returns a scheduler's name of these devices.

        Args:
            field: attribute of `Accelerator`.
            who: name of the scheduler in errors.

        Raises:
            ConfigError: if it has no name for them.
        """
        name = getattr(self.accelerator, field)
        if name is None:
            kinds = [kind for kind, each in _ACCELERATORS.items() if getattr(each, field)]
            raise ConfigError(
                f"{who} has no {self.topology.kind}: there are {', '.join(kinds)}; ray and slurm "
                "run every GPU"
            )
        return name

    @property
    def vm_type(self) -> str:
        """Accelerator type of a TPU VM.

        Raises:
            ConfigError: if there is none, or it stands for another topology.
        """
        if self.accelerator.vm is None:
            raise ConfigError("gcloud rents v4, v5e, v5p and v6e: take jobset or xpk for others")
        chips = self.count * self.chips
        meant = [each for each in _TYPED_CUBES if math.prod(map(int, each.split("x"))) == chips]
        name = f"{self.accelerator.vm}-{chips * self.topology.device.cores}"
        if self.sides.count("x") == 2 and self.sides not in meant:
            is_what = f"is {meant[0]}, not {self.sides}" if meant else "has no one topology"
            raise ConfigError(
                f"gcloud rents accelerator types, of which {name} {is_what}: take one of "
                f"{', '.join(_TYPED_CUBES)}, or jobset"
            )
        return name


def hosts(topology: Topology, *, whole: bool = True) -> Hosts:
    """Returns the machines of a topology.

    Args:
        whole: whether 8 chips of v5e or v6e are one machine; xpk divides them into two.

    Raises:
        ConfigError: if its devices are not accelerators.
    """
    device, chips = topology.device, topology.chips
    if device.platform == "cpu":
        known = ", ".join(kind for kind, each in DEVICES.items() if each.platform != "cpu")
        raise ConfigError(f"topology {topology.name!r}: jobs run on one of {known}")
    per_host = 8 if device.dims == 2 and chips == 8 and whole else device.per_host
    return Hosts(topology, -(-chips // per_host), min(chips, per_host))
