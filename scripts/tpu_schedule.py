"""The compiled schedule of each kernel on five TPU generations, beside jax's splash attention.

A row of the table says, of one kernel:

- bundles, and matmuls: the slots of the matrix units that they fill, of so many a bundle;
- MXU: their share of all slots. It counts code, not time: a loop counts once, however often it
  runs, so kernels compare where the same loop dominates them;
- inner: the same of the straight piece of code with the most matmuls, which is the inner loop;
- spills: registers written to memory or read back, since there are too few;
- ratio: MXU over that of splash attention, causal, with as large blocks of scores.

Nothing is run, so nothing here is a time. Needs `pip install libtpu`.

    python scripts/tpu_schedule.py [--generations v5e,v6e] [--programs prefill,decode] [--model 7B]
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator

from tpu_compile import GENERATIONS, Schedule, in_child, memory_of, mesh, schedules

SPLASH = "splash"
CONTEXT = 1_010_000
HEADS = ("TPU", "kernel", "bundles", "matmuls", "slots", "MXU", "inner", "spills", "ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--generations", default=",".join(GENERATIONS))
    parser.add_argument("--programs", default="prefill,sparse prefill,decode,selection")
    parser.add_argument("--model", default="7B")
    parser.add_argument("--json", action="store_true", help="a JSON line for each kernel")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        for name, found in examine(args.child, args.programs.split(","), args.model):
            print(json.dumps({"program": name} | dataclasses.asdict(found)), flush=True)
        return
    if not args.json:
        print("|", " | ".join(HEADS), "|\n" + "|---" * len(HEADS) + "|", flush=True)
    for generation in args.generations.split(","):
        flags = ["--programs", args.programs, "--model", args.model]
        splash = 0.0
        for row in in_child(__file__, "--child", generation, *flags):
            name = row.pop("program")
            found = Schedule(**row)
            splash = found.mxu if name == SPLASH else splash
            ratio = found.mxu / splash if name == SPLASH or "prefill" in name else None
            if args.json:
                figures = {"mxu": found.mxu, "inner_mxu": found.inner_mxu, "ratio": ratio}
                print(json.dumps({"generation": generation, "program": name} | row | figures))
            else:
                print(line(generation, found, ratio), flush=True)


def line(generation: str, found: Schedule, ratio: float | None) -> str:
    cells = (
        generation,
        found.name,
        f"{found.bundles:,}",
        f"{found.matmuls:,}",
        str(found.slots),
        f"{found.mxu:.3f}",
        f"{found.inner_mxu:.3f}",
        f"{found.spills:,}",
        "" if ratio is None else f"{ratio:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def examine(generation: str, programs: list[str], model: str) -> Iterator[tuple[str, Schedule]]:
    """Schedules of splash attention and of our programs, at what a device of a mesh holds."""
    import jax

    from pallas_kernels.cases import MODELS
    from pallas_kernels.programs import inputs, program

    device = mesh(generation)
    for found in schedules(device, *splash(1024, 2048, 512)):
        yield SPLASH, found
    case = MODELS[model].share(CONTEXT, memory_of(device))
    for name in programs:
        args = jax.eval_shape(lambda name=name: inputs(name, case))
        for found in schedules(device, program(name, case, "mosaic_tpu"), *args):
            yield name, found


def splash(block_q: int, block_kv: int, compute: int, *, length: int = 8192):
    """Splash attention of jax, of a kv head and its 7 query heads, and the shapes it takes."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, head_dim = 7, 128
    attend = kernel.make_splash_mqa_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=kernel.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=compute),
    )
    query = jax.ShapeDtypeStruct((heads, length, head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((length, head_dim), jnp.bfloat16)
    return attend, query, key, key


if __name__ == "__main__":
    sys.exit(main())
