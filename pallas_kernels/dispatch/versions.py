"""Versions of jax, jax-triton and Triton that were tested together, and of jax with Mosaic GPU.

jax-triton reaches into jax and into Triton, so that most pairs of releases fail, some of them
only when a kernel is compiled. What Pallas has for Mosaic GPU changes with every release.
"""

import importlib.metadata
import re

PACKAGES = "jax", "jax-triton", "triton"
TESTED = (
    # jax from, jax before, jax-triton, triton
    ((0, 10, 2), (0, 12), (0, 3), (3, 6)),
    ((0, 11), (0, 12), (0, 4), (3, 7)),
)
PINS = "'jax>=0.10.2,<0.12' jax-triton==0.3.1 triton==3.6.0"
"""Requirements for pip: the first pair of these versions."""
MOSAIC_GPU = (0, 10, 2), (0, 11, 2)
"""Releases of JAX that were tested with the Mosaic GPU kernels."""


def number(package: str) -> tuple[int, ...]:
    """Return the version of an installed package as numbers.

    Raises:
        importlib.metadata.PackageNotFoundError: if it is not installed.
    """
    return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(package))[:3]))


def triton_fault() -> str | None:
    """Explain why Triton kernels cannot run with the installed packages; None if they can."""
    try:
        jax, *others = map(number, PACKAGES)
    except importlib.metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed: pip install {PINS}"
    for low, high, *wanted in TESTED:
        if low <= jax < high and [each[:2] for each in others] == wanted:
            return None
    found = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in PACKAGES)
    return f"{found} do not work together: pip install {PINS}"


def mosaic_gpu_fault() -> str | None:
    """Explain that the installed jax was never tried with Mosaic GPU kernels; None if it was."""
    if number("jax") in MOSAIC_GPU:
        return None
    found = importlib.metadata.version("jax")
    tested = " and ".join(".".join(map(str, each)) for each in MOSAIC_GPU)
    return f"its kernels were tested with jax {tested}, not {found}"
