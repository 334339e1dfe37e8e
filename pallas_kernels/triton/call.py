"""One way to call a Triton kernel in a jax program, whichever jax-triton is installed."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels.dispatch import backend, versions
from pallas_kernels.dispatch.backend import Unsupported

LEAST = 80
"""Ampere: the first with bfloat16 and asynchronous copies."""


def capability() -> int:
    """Compute capability of the GPU that a program traced now is compiled for, such as 90.

    Raises:
        Unsupported: if it is too old, or not here and of no known name.
    """
    found = backend.capability()
    if found < LEAST:
        raise Unsupported(
            f"{backend.device().kind} has compute capability {found / 10}; "
            f"Triton kernels need {LEAST / 10}"
        )
    return found


def launch(
    kernel: Any,
    *args: Array,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int] | tuple[int, int] | tuple[int, int, int],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> list[Array]:
    """Launch a `triton.jit` kernel, whose last pointers are those of its outputs.

    Works in jit, scan and shard_map; not in vmap or grad.

    Args:
        outputs: written by the kernel, undefined where it does not.
        num_stages: steps of a loop whose loads are in flight.
        constants: its `tl.constexpr` arguments.

    Raises:
        Unsupported: if the installed packages do not work together, or the GPU is too old.
    """
    fault = versions.triton_fault()
    if fault is not None:
        raise Unsupported(fault)
    import jax_triton

    described = "out_type" if versions.number("jax-triton") >= (0, 4) else "out_shape"
    return jax_triton.triton_call(
        *args,
        kernel=kernel,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=capability(),
        **{described: list(outputs)},
        **constants,
    )
