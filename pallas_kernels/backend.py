"""Backends: their names, the preferred order per device, and the refusal `Unsupported`.

The name of a backend is the name of the module that implements it in the folder of an
operation, so `load("prefill", "xla")` is `pallas_kernels.prefill.xla`.
"""

import importlib
from types import ModuleType

PREFERRED = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("xla",)}
NAMES = ("reference", "xla")


class Unsupported(NotImplementedError):
    """A backend cannot take these arguments although another could; the text says why."""


def choose(platform: str, name: str | None = None) -> str:
    """The backend to use on a platform ("cpu", "gpu" or "tpu").

    A `name` is taken as it is and never replaced by another.

    Raises:
        Unsupported: if there is no backend of that name, or none for the platform.
    """
    if name is not None:
        if name not in NAMES:
            raise Unsupported(f"there is no backend {name!r}; there are {', '.join(NAMES)}")
        return name
    if platform not in PREFERRED:
        raise Unsupported(f"no backend for {platform!r}; there is {', '.join(PREFERRED)}")
    return PREFERRED[platform][0]


def load(operation: str, name: str) -> ModuleType:
    """The module that implements an operation, imported on first use."""
    return importlib.import_module(f"pallas_kernels.{operation}.{name}")


def compiler_options(platform: str) -> dict[str, int]:
    """What to compile a program that contains these operations with, for speed alone."""
    # XLA halves the vectors of x86 by default, which costs attention a tenth of its speed.
    return {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else {}
