"""Backends: their names, where each runs, the preferred one per device, the refusal `Unsupported`.

The name of a backend is the name of the module that implements it in the folder of an
operation, so `load("prefill", "xla")` is `pallas_kernels.prefill.xla`.
"""

import importlib
import re
from types import ModuleType
from typing import NamedTuple

from pallas_kernels.dispatch.tiles import generations, tuned
from pallas_kernels.dispatch.versions import mosaic_gpu_fault, triton_fault

FUNCTIONS = {"prefill": "prefill", "decode": "decode", "select": "vote"}
"""The function of an operation's module that a backend implements."""
RUNS_ON = {
    "mosaic_tpu": ("tpu",),
    "mosaic_gpu": ("gpu",),
    "triton": ("gpu",),
    "xla": ("cpu", "gpu", "tpu"),
    "reference": ("cpu", "gpu", "tpu"),
}
NAMES = tuple(RUNS_ON)
LANES = 128
"""Lanes of a vector register of a TPU."""
TRITON_HEADS = 16, 32, 64, 128, 256
"""Head dimensions that Triton kernels support."""
HOPPER = 90
"""Compute capability that Mosaic GPU kernels are for, times 10."""
HOPPER_HEADS = 64, 128
"""Head dimensions that Mosaic GPU kernels support; decode supports 128 only."""
CAPABILITIES = {
    "A100": 80,
    "A10": 86,
    "A40": 86,
    "L4": 89,
    "L40": 89,
    "L40S": 89,
    "RTX 6000 Ada": 89,
    "RTX 4090": 89,
    "H100": 90,
    "H200": 90,
    "GH200": 90,
    "B200": 100,
    "GB200": 100,
    "RTX PRO 6000 Blackwell": 120,
    "RTX 5090": 120,
}
"""Compute capabilities by a word in a GPU's name, to compile for GPUs that are not present."""


class Unsupported(NotImplementedError):
    """Error of a backend that does not support these arguments; the text says why."""


class Backends(NamedTuple):
    """The backend of each operation."""

    prefill: str
    decode: str
    select: str

    def __str__(self):
        return ", ".join(map(" ".join, zip(self._fields, self, strict=True)))


PREFERRED = {
    "cpu": ("xla",),
    "gpu": ("mosaic_gpu", "triton", "xla"),
    "tpu": ("mosaic_tpu", "xla"),
}
"""Backends of each platform, best first; the first one that is not `unavailable` is used."""

Choice = str | Backends | None
"""One backend for all operations, or one for each, or None for the preferred ones."""


def on(platform: str) -> tuple[str, ...]:
    """Return the names of the backends that run on a platform."""
    return tuple(name for name in NAMES if platform in RUNS_ON[name])


def choose(
    platform: str,
    choice: Choice = None,
    *,
    kind: str | None = None,
    head_dim: int = LANES,
    dtype: str = "bfloat16",
) -> Backends:
    """Choose the backends to use on a platform ("cpu", "gpu" or "tpu").

    A choice is never replaced by another backend. Without one, the result is the first backend of
    the platform that is not `unavailable`.

    Args:
        kind: device kind in JAX; None for the device that a program traced now is compiled for.
        head_dim: size of a head.
        dtype: dtype of queries, keys and values.

    Raises:
        Unsupported: if there is no backend of that name, or if it does not run there.
    """
    if platform not in PREFERRED:
        raise Unsupported(f"no backend for {platform!r}; there is {', '.join(PREFERRED)}")
    if choice is None:
        of_device = {"kind": kind, "head_dim": head_dim, "dtype": dtype}
        names = PREFERRED[platform]
        best = next(name for name in names if unavailable(name, **of_device) is None)
        return Backends(best, best, best)
    chosen = Backends(choice, choice, choice) if isinstance(choice, str) else choice
    for name in chosen:
        if name not in NAMES:
            raise Unsupported(f"there is no backend {name!r}; there are {', '.join(NAMES)}")
        if platform not in RUNS_ON[name]:
            raise Unsupported(
                f"backend {name!r} runs on {', '.join(RUNS_ON[name])}; on this device ({platform}) "
                f"there are {', '.join(on(platform))}"
            )
        fault = _fault(name, kind)
        if fault is not None:
            raise Unsupported(f"backend {name!r}: {fault}")
    return chosen


def unavailable(
    name: str, *, kind: str | None = None, head_dim: int = LANES, dtype: str = "bfloat16"
) -> str | None:
    """Explain why a backend is not preferred where it could run; None if nothing is against it.

    Arguments are those of `choose`.
    """
    if name == "mosaic_tpu" and head_dim != LANES:
        return f"heads of {head_dim} do not fill the {LANES} lanes of a TPU's registers"
    if name == "triton" and head_dim not in TRITON_HEADS:
        return f"heads of {head_dim} are none of {', '.join(map(str, TRITON_HEADS))}"
    if name == "mosaic_gpu":
        if head_dim != LANES:
            return f"heads of {head_dim}, where decode takes {LANES}"
        if dtype != "bfloat16":
            return f"{dtype}, where it takes bfloat16"
        if kind is None and device().platform != "gpu":
            return "there is no GPU here to tell its compute capability"
    return _fault(name, kind)


def _fault(name: str, kind: str | None) -> str | None:
    """Explain why a backend cannot run; None if it can, or if only a device could tell."""
    if name == "triton":
        return triton_fault()
    if name != "mosaic_gpu":
        return None
    fault = mosaic_gpu_fault()
    if fault is not None or (kind is None and device().platform != "gpu"):
        return fault
    kind = device().kind if kind is None else kind
    try:
        found = capability(kind)
    except Unsupported as error:
        return str(error)
    if found == HOPPER:
        return None
    return f"{kind} has compute capability {found / 10}; its kernels are for {HOPPER / 10}"


def check_heads(head_dim: int) -> None:
    """Check that a TPU would not pad the head dimension, and with it the whole cache.

    Raises:
        Unsupported: if it is not a multiple of the lanes of a register.
    """
    if head_dim % LANES:
        raise Unsupported(
            f"{head_dim=} must be a multiple of {LANES}: the program would lay out a copy of "
            "the cache, padded"
        )


class Device(NamedTuple):
    """Platform and device kind, in jax's words, that a program is compiled for."""

    platform: str
    kind: str


def device() -> Device:
    """Return the target of a program traced now: a device of the mesh in use, or the default."""
    import jax  # takes long, and those who want names only need it not

    found = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return Device(found.platform, found.device_kind)


def capability(kind: str | None = None) -> int:
    """Return the compute capability of a GPU, such as 90 for 9.0.

    Args:
        kind: device kind in JAX; None for the device that a program traced now is compiled for.

    Raises:
        Unsupported: if the GPU is not present and its name is unknown.
    """
    import jax

    kind = device().kind if kind is None else kind
    known = [value for word, value in CAPABILITIES.items() if re.search(rf"\b{word}\b", kind)]
    if known:
        return known[0]
    for each in jax.devices():
        if each.device_kind == kind:
            return int(each.compute_capability.replace(".", ""))
    raise Unsupported(f"no compute capability is known of {kind!r}, which is not in this machine")


def preferences() -> dict[str, Backends]:
    """Return the preferred backends of each kind of device, those with tuned tiles by generation.

    Raises:
        Unsupported: if the tuned tiles cannot be read.
    """
    rows: dict[str, Backends] = {}
    try:
        for platform, names in PREFERRED.items():
            kinds = {key: kind for name in names for key, kind in generations(name).items()}
            for generation, kind in kinds.items() or [("", None)]:
                key = f"{platform} {generation.removeprefix(platform)}".rstrip()
                rows[key] = choose(platform, kind=kind)
    except ValueError as error:
        raise Unsupported(str(error)) from None
    return rows


def load(operation: str, name: str) -> ModuleType:
    """Import the module that implements an operation."""
    return importlib.import_module(f"pallas_kernels.{operation}.{name}")


def call(operation: str, choice: Choice, queries, *args, **keywords):
    """Call an operation by the backend chosen for it, on the device that is traced for.

    Keywords that the backend alone knows, such as tile sizes, win over those that are
    tuned for the device.

    Raises:
        Unsupported: if it does not run there or cannot take these arguments.
    """
    target = device()
    head_dim = queries.shape[-1]
    dtype = str(queries.dtype)
    choice = getattr(choice, operation) if isinstance(choice, Backends) else choice
    chosen = choose(target.platform, choice, kind=target.kind, head_dim=head_dim, dtype=dtype)
    name = getattr(chosen, operation)
    tabled = operation if keywords.get("plan") is None else f"sparse {operation}"
    try:
        keywords = tuned(name, tabled, target.kind, dtype, head_dim) | keywords
    except ValueError as error:
        raise Unsupported(str(error)) from None
    try:
        return getattr(load(operation, name), FUNCTIONS[operation])(queries, *args, **keywords)
    except Unsupported as error:
        raise Unsupported(f"{operation} by {name}: {error} (xla takes every shape)") from None


def compiler_options(platform: str) -> dict[str, int]:
    """Return compiler options for programs that contain these operations; for speed alone."""
    # XLA halves the vectors of x86 by default, which costs attention a tenth of its speed.
    return {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else {}
