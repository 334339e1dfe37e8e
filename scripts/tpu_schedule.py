"""The compiled schedule of each kernel on five TPU generations, beside jax's splash attention.

A row of the table says, of one kernel:

- bundles, and matmuls: the slots of the matrix units that they fill, of so many a bundle;
- MXU: their share of all slots. It counts code, not time: a loop counts once, however often it
  runs, so kernels compare where the same loop dominates them;
- inner: the same of the straight piece of code with the most matmuls, which is the inner loop;
- spills: registers written to memory or read back, since there are too few;
- ratio: MXU over the better of two splash attentions, causal, one with as large blocks of scores.

Nothing is run, so nothing here is a time. Needs `pip install libtpu`.

    python scripts/tpu_schedule.py [--generations v5e,v6e] [--programs prefill,decode] [--model 7B]
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

from tpu_compile import GENERATIONS, Schedule, in_child, memory_of, mesh, schedules

SPLASH = "splash"
# Of queries, of keys, and of keys that are computed with at a time: as large as our prefill's,
# for which not every generation has the registers, and smaller ones.
BLOCKS = ((1792, 2048, 512), (1024, 2048, 512))
CONTEXT = 1_010_000
HEADS = ("TPU", "kernel", "bundles", "matmuls", "slots", "MXU", "inner", "spills", "ratio")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--generations", default=",".join(GENERATIONS))
    parser.add_argument("--programs", default="prefill,sparse prefill,decode,selection")
    parser.add_argument("--model", default="7B")
    parser.add_argument("--json", action="store_true", help="a JSON line for each kernel")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        for name, found in examine(args.child, args.programs.split(","), args.model):
            row = {"error": found} if isinstance(found, str) else dataclasses.asdict(found)
            print(json.dumps({"program": name} | row), flush=True)
        return 0
    if not args.json:
        print("|", " | ".join(HEADS), "|\n" + "|---" * len(HEADS) + "|", flush=True)
    failed = False
    for generation in args.generations.split(","):
        flags = ["--programs", args.programs, "--model", args.model]
        best = 0.0
        for row in in_child(__file__, "--child", generation, *flags):
            name = row.pop("program")
            if "error" in row:
                failed |= not name.startswith(SPLASH)
                print(f"{generation}, {name}: {row['error']}", file=sys.stderr)
                continue
            found = Schedule(**row)
            best = max(best, found.mxu) if name.startswith(SPLASH) else best
            ratio = found.mxu / best if "prefill" in name else None
            if args.json:
                figures = {"mxu": found.mxu, "inner_mxu": found.inner_mxu, "ratio": ratio}
                print(json.dumps({"generation": generation, "program": name} | row | figures))
            else:
                print(line(generation, name, found, ratio), flush=True)
    return failed


def line(generation: str, name: str, found: Schedule, ratio: float | None) -> str:
    cells = (
        generation,
        name if name.startswith(SPLASH) or name == found.name else f"{name}: {found.name}",
        f"{found.bundles:,}",
        f"{found.matmuls:,}",
        str(found.slots),
        f"{found.mxu:.3f}",
        f"{found.inner_mxu:.3f}",
        f"{found.spills:,}",
        "" if ratio is None else f"{ratio:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def examine(
    generation: str, programs: list[str], model: str
) -> Iterator[tuple[str, Schedule | str]]:
    """Schedules of splash attention and of our programs, at what a device of a mesh holds.

    Of a kernel that does not compile, the compiler's complaint.
    """
    import jax

    from pallas_kernels.programs import inputs, program
    from qwen_jax.planner.shapes import MODELS

    device = mesh(generation)
    case = MODELS[model].share(CONTEXT, memory_of(device))
    jobs: dict[str, tuple[Any, ...]] = {
        f"{SPLASH} {q} x {kv}": splash(q, kv, compute) for q, kv, compute in BLOCKS
    }
    for name in programs:
        args = jax.eval_shape(lambda name=name: inputs(name, case))
        jobs[name] = program(name, case, "mosaic_tpu"), *args
    for name, job in jobs.items():
        try:
            for found in schedules(device, *job):
                yield name, found
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            yield name, str(error).splitlines()[0]


def splash(block_q: int, block_kv: int, compute: int):
    """Splash attention of jax, of a kv head and its 7 query heads, and the shapes it takes."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, length, head_dim = 7, 14_336, 128
    attend = kernel.make_splash_mqa_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=kernel.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=compute),
    )
    query = jax.ShapeDtypeStruct((heads, length, head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((length, head_dim), jnp.bfloat16)
    return attend, query, key, key


if __name__ == "__main__":
    sys.exit(main())
