"""Predicted value of tile sizes of the TPU kernels: the fraction of filled matrix-unit slots.

Of those within 2% of the best the one with most queries is taken, which reads keys and values least
often. Decode, which is bound by memory, is tuned by time only.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from tpu_compile import GENERATIONS, Schedule, in_child, memory_of, mesh, schedules
from tpu_schedule import CONTEXT

DEVICES, PROGRAMS = tuple(GENERATIONS), ("prefill", "sparse prefill", "selection")
HEADS: dict[str, Any] = {}  # of all kinds
# The keywords of each program's kernel, from small to large.
CANDIDATES: dict[str, dict[str, list[Any]]] = {
    "prefill": {
        "tiles": [
            {"q": q, "k": k} for q, k in itertools.product((896, 1792, 2688), (512, 1024, 2048))
        ]
    },
    "sparse prefill": {"step": [512, 1024, 2048, 4096]},
    "selection": {"tile": [256, 512, 1024]},
    "decode": {"block_bytes": [2**18, 2**19, 2**20, 2**21]},
}
CLOSE = 0.98

__all__ = ["CANDIDATES", "DEVICES", "HEADS", "PROGRAMS", "compiled", "in_child"]


def compiled(device: str, programs: list[str], model: str, candidates) -> Iterator[dict[str, Any]]:
    """Compiles all candidates for a generation; yields rows with their value."""
    import jax

    from pallas_kernels.programs import inputs, program
    from qwen_jax.planner.shapes import MODELS

    topology = mesh(device)
    case = MODELS[model].share(CONTEXT, memory_of(topology))
    for name in programs:
        args = jax.eval_shape(lambda name=name: inputs(name, case))
        for sizes, keywords in candidates(name):
            worth = None
            try:
                found = schedules(topology, program(name, case, "mosaic_tpu", **keywords), *args)
                worth = min(each.mxu for each in found)
                says = "; ".join(map(summary, found))
            except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
                says = str(error).splitlines()[0]
            yield {"program": name, "sizes": sizes, "worth": worth, "says": says, "close": CLOSE}


def summary(found: Schedule) -> str:
    inner = f"inner {found.inner_mxu:.3f}"
    return f"{found.name} MXU {found.mxu:.3f} {inner} spills {found.spills:,}"
