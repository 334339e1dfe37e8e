"""Predicted value of tile sizes of the Triton kernels, from compilation for NVIDIA GPUs.

Sizes are valid if the kernel fits the shared memory of a program and spills no register.

The value of prefill and selection is an upper bound of the fraction of a step's cycles in which
tensor cores are busy. A step takes a core at least the cycles of its products, its instructions,
its exponentials, or the reads of its keys from the L2 cache, of all programs that the core runs
at a time; and what one warp of each scheduler waits for in turn, its products and its other
instructions. On Blackwell all warps of a program wait for its products together.

Decode is bound by memory. Its value is the bytes that a core has in flight, up to those that
memory can deliver in `AHEAD`: more do not help.

Of sizes of about equal value the last candidate is taken: most queries, which read keys least
often, and most keys; for decode the fewest stages, which leave room for most programs.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_compile
from gpu_compile import GPUS, Gpu, Kernel, in_child
from gpu_facts import CONTEXT

DEVICES = tuple(GPUS)
HEAD_DIM = 128
HEADS = {"dtype": "bfloat16", "head_dim": HEAD_DIM}  # of all published models
# The keywords of each program's kernel; of sizes that are about as good the last are taken.
CANDIDATES: dict[str, dict[str, list[Any]]] = {
    "prefill": {
        "tiles": [{"q": 64, "k": 64}, *({"q": 128, "k": k} for k in (32, 64, 128))],
        "num_warps": [4, 8],
        "num_stages": [2, 3],
    },
    "sparse prefill": {
        "tiles": [{"q": 64, "k": 64}, {"q": 128, "k": 32}, {"q": 128, "k": 64}],
        "num_warps": [4, 8],
        "num_stages": [2, 3],
    },
    "decode": {"tile": [32, 64], "num_warps": [4], "num_stages": [4, 3, 2]},
    "selection": {"num_warps": [4, 8], "num_stages": [2, 3]},
}
PROGRAMS = tuple(CANDIDATES)
CLOSE = 0.98
AHEAD = 2e-6  # seconds, more than a read takes where memory is busy
L2_BYTES = 64  # that a core reads in a cycle
EXPONENTIALS = 16  # that a core computes in a cycle
SCHEDULERS = 4  # of a core, each of which issues an instruction in a cycle

__all__ = ["CANDIDATES", "DEVICES", "HEADS", "PROGRAMS", "compiled", "in_child"]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """Work of a program in a step of its inner loop.

    Attributes:
        rows: rows of the matrix products.
        keys: keys of the step.
        products: number of matrix products: 1 for scores only, 2 with that by the values.
    """

    rows: int
    keys: int
    products: int


def share(gpu: Gpu, kernel: Kernel, loop: tuple[int, int], step: Step) -> float:
    """Bounds the fraction of a step's cycles in which tensor cores are busy, from above."""
    programs = gpu_compile.resident(gpu, kernel)
    instructions, exponentials = loop
    together = 1 if kernel.columns else max(kernel.warps // SCHEDULERS, 1)
    product = step.products * step.rows * step.keys * HEAD_DIM / gpu.products
    issue = instructions * kernel.warps / SCHEDULERS
    exponential = exponentials * kernel.warps * 32 / EXPONENTIALS
    read = step.products * 2 * step.keys * HEAD_DIM / L2_BYTES
    busiest = programs * max(product, issue, exponential, read)
    return programs * product / max(busiest, (product + issue) / together)


def ahead(gpu: Gpu, kernel: Kernel, tile: int, num_stages: int) -> float:
    """Returns bytes in flight over those that memory delivers to a core in `AHEAD`, at most 1."""
    tile_bytes = 2 * 2 * tile * HEAD_DIM
    on_way = gpu_compile.resident(gpu, kernel) * (num_stages - 1) * tile_bytes
    return min(1, on_way / (AHEAD * gpu.bandwidth / gpu.cores))


def summary(kernel: Kernel) -> str:
    spilled = f", spills {kernel.spilled:,}" if kernel.spilled else ""
    return f"{kernel.name} {kernel.registers} registers, {kernel.shared:,} bytes{spilled}"


def worth(
    gpu: Gpu, name: str, made: list[tuple[Kernel, Path]], sizes: dict[str, Any]
) -> float | None:
    """Returns the value of a program's kernels; None if they spill or do not fit."""
    if any(each.spilled or each.shared > gpu.shared_per_block for each, _ in made):
        return None
    if name == "decode":
        return ahead(gpu, streaming(made), sizes["tile"], sizes["num_stages"])
    step = Step(rows=64, keys=64, products=1)
    if name != "selection":
        step = Step(rows=sizes["tiles"]["q"], keys=sizes["tiles"]["k"], products=2)
    shares = [share(gpu, each, gpu_compile.inner_loop(code), step) for each, code in made]
    return len(shares) / sum(1 / each for each in shares)


def streaming(made: list[tuple[Kernel, Path]]) -> Kernel:
    """Returns the kernel of decode that reads the keys."""
    (kernel,) = (each for each, _ in made if each.name == "_attend")
    return kernel


def compiled(device: str, programs: list[str], model: str, candidates) -> Iterator[dict[str, Any]]:
    """Compiles all candidates for a GPU; yields rows with their value."""
    import jax

    from pallas_kernels.programs import inputs, program
    from qwen_jax.planner.shapes import MODELS
    from qwen_jax.sparse import budgets

    gpu, mesh = GPUS[device], gpu_compile.mesh(device)
    case = MODELS[model].served(CONTEXT)
    for name in programs:
        args = jax.eval_shape(lambda name=name: inputs(name, case, tiles=budgets.tiles_on("gpu")))
        for sizes, keywords in candidates(name):
            value = None
            try:
                run = program(name, case, "triton", **keywords)
                made = gpu_compile.kernels(mesh, run, *args)
                value = worth(gpu, name, made, sizes)
                says = "; ".join([f"worth {value}", *(summary(each) for each, _ in made)])
                if name == "decode":
                    at_a_time = gpu_compile.resident(gpu, streaming(made)) * gpu.cores
                    sizes = sizes | {"programs": at_a_time}
            except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
                says = str(error).splitlines()[0]
            yield {"program": name, "sizes": sizes, "worth": value, "says": says, "close": CLOSE}
