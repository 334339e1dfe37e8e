"""Compilation of the Triton and Mosaic GPU kernels for NVIDIA GPUs, without a GPU.

Each kernel is compiled at the size at which a GPU serves a million tokens: 7B on one GPU, 14B on
four. Then come the engine's steps of 7B with the kernels inside. Nothing is run, so no times are
measured. Needs the same packages as `gpu_compile`.

    python scripts/gpu_facts.py [--gpus h200,a100] [--models 7B,14B] [--backends triton]
                                [--dtype float32] [--steps] [--json]
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gpu_compile
import hlo

from qwen_jax.models import presets

CONTEXT, SLICE, PAGE = 1_010_000, 32_768, 1024
TENSOR = {"7B": 1, "14B": 4}
"""Number of GPUs that divide the heads of a model."""
BACKENDS = "triton", "mosaic_gpu"
CALLS = {"triton": "triton_kernel_call", "mosaic_gpu": "mosaic_gpu_v2"}
"""Targets of XLA's custom calls, by backend."""
HOPPER = "h200"
"""GPU that Mosaic GPU kernels are for."""


def kernels(gpu: str, model: str, backend: str, dtype: str) -> Iterator[dict]:
    """Compiles each program of `pallas_kernels.programs`; yields rows of its resources."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.programs import PROGRAMS, inputs, program
    from qwen_jax.planner.shapes import MODELS
    from qwen_jax.sparse import budgets as sparse

    tiles = sparse.tiles_on("gpu")
    case = MODELS[model].served(CONTEXT, tensor=TENSOR[model])
    layer = case.num_kv_heads * case.num_pages * case.page * case.head_dim
    for name in PROGRAMS:
        args = jax.eval_shape(lambda name=name: inputs(name, case, jnp.dtype(dtype), tiles))
        made = gpu_compile.compiled(gpu_compile.mesh(gpu), program(name, case, backend), *args)
        yield {
            "gpu": gpu,
            "model": model,
            "backend": backend,
            "program": name,
            "kernels": [kernel._asdict() for kernel in made.kernels],
            "temporaries": made.memory.temp_size_in_bytes,
            "copies_cache": bool(hlo.sizes(made.text) & {layer, layer * case.num_layers}),
        }


def steps(gpu: str, backend: str) -> Iterator[dict]:
    """Compiles the engine's steps of 7B with a million tokens on one GPU; yields rows."""
    from qwen_jax.config import SparseConfig
    from qwen_jax.engine import memory as budget
    from qwen_jax.planner import aot
    from qwen_jax.planner.shapes import MODELS

    with tempfile.TemporaryDirectory() as folder:
        config = presets.config(Path(folder), "7b")
    columns = MODELS["7B"].num_columns
    rows = ((columns,) * config.num_heads,) * config.num_layers
    load = budget.Workload(tokens=CONTEXT, page=PAGE, slice_len=SLICE, columns=columns)
    budgets = SparseConfig(vertical=rows, slash=rows, last_q=64)
    shape = config.num_kv_heads, load.pages + 1, PAGE, config.head_dim
    mesh = gpu_compile.mesh(gpu)
    for name, step in aot.steps(config, load, mesh, budgets, backend).items():
        made = step()
        yield {
            "gpu": gpu,
            "model": "7B",
            "backend": backend,
            "program": f"step: {name}",
            "calls": made.text.count(f'custom_call_target="{CALLS[backend]}"'),
            "cache_bytes": 2 * 2 * config.num_layers * math.prod(shape),
            "overwritten": made.overwritten,
            "peak": made.peak,
            "temporaries": made.temporaries,
            "copies_cache": _copies(made.text, math.prod(shape), config.num_layers),
        }


def _copies(text: str, layer: int, num_layers: int) -> bool:
    """Returns True if a step creates an array as large as a cache layer, or copies the whole cache.

    Arrays as large as the whole cache count only if copied: in-place updates look like creations.
    """
    copied = hlo.sizes(text, "copy", "copy-start", "transpose")
    return layer in hlo.sizes(text) or layer * num_layers in copied


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", default=",".join(gpu_compile.GPUS))
    parser.add_argument("--models", default=",".join(TENSOR))
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--steps", action="store_true", help="of the first GPU")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name in args.backends.split(","):
        if name not in BACKENDS:
            parser.error(f"there is no backend {name!r}; there are {', '.join(BACKENDS)}")
        fault = gpu_compile.missing(name)
        if fault:
            parser.error(fault)
    for name in args.gpus.split(","):
        if name not in gpu_compile.GPUS:
            parser.error(f"there is no GPU {name!r}; there are {', '.join(gpu_compile.GPUS)}")
    for name in filter(None, args.models.split(",")):
        if name not in TENSOR:
            parser.error(f"there is no model {name!r}; there are {', '.join(TENSOR)}")
    if not gpu_compile.ready():
        arguments = [*sys.argv[1:], *([] if args.json else ["--json"])]
        for row in gpu_compile.in_child(__file__, *arguments):
            _print(row, as_json=args.json)
        return
    gpus = args.gpus.split(",")
    for gpu in gpus:
        for model in filter(None, args.models.split(",")):
            for backend in args.backends.split(","):
                if backend == "mosaic_gpu" and (gpu != HOPPER or args.dtype == "float32"):
                    continue
                for row in kernels(gpu, model, backend, args.dtype):
                    _print(row, as_json=True)
    if args.steps:
        for backend in args.backends.split(","):
            for row in steps(gpus[0], backend):
                _print(row, as_json=True)


def _print(row: dict, *, as_json: bool) -> None:
    """Prints a row as JSON, or as rows of tables."""
    if as_json:
        print(json.dumps(row), flush=True)
        return
    cells = [row["gpu"], row["model"], row["program"]]
    beside = f"{row['temporaries'] / 1e6:,.1f} MB"
    if "kernels" not in row:
        print("|", " | ".join([*cells, f"{row['peak'] / 2**30:.2f} GiB", beside]), "|", flush=True)
    for kernel in row.get("kernels", ()):
        facts = (
            f"{kernel['registers']}",
            f"{kernel['spilled']}",
            f"{kernel['shared'] / 1024:.0f} KiB",
        )
        named = f"`{kernel['name']}`"
        print("|", " | ".join([*cells, named, *facts, beside]), "|", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
