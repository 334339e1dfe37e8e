"""One way to call a Triton kernel in a jax program, whichever jax-triton is installed."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels import versions
from pallas_kernels.backend import Unsupported, device

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
"""Of GPUs by a word in their names, for programs compiled where there is none."""
LEAST = 80
"""Ampere: the first with bfloat16 and asynchronous copies."""


def capability() -> int:
    """Compute capability of the GPU that a program traced now is compiled for, such as 90.

    Raises:
        Unsupported: if it is too old, or not here and of no known name.
    """
    kind = device().kind
    present = [each for each in jax.devices() if each.device_kind == kind]
    if present:
        found = int(present[0].compute_capability.replace(".", ""))
    else:
        known = [value for word, value in CAPABILITIES.items() if re.search(rf"\b{word}\b", kind)]
        if not known:
            raise Unsupported(
                f"no compute capability is known of {kind!r}, which is not in this machine"
            )
        found = known[0]
    if found < LEAST:
        raise Unsupported(
            f"{kind} has compute capability {found / 10}; Triton kernels need {LEAST / 10}"
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
    """Results of a `triton.jit` kernel, whose last pointers are those of its outputs.

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
