"""Search tile sizes of the TPU kernels: by compiled schedule without a TPU, by time on one.

Without a device every candidate is compiled for every generation. Of those that compile the one
with the most of its matrix unit's slots filled is best, and of those within 2% of it the one with
most queries, which reads keys and values least often. Decode, which waits for memory, is tuned by
time only.

With --time the candidates run on this machine's TPU, and the fastest of the median is taken.
Either way the table of before is read, and what was searched is replaced.

    python scripts/tune_kernels.py [--generations v5e] [--programs prefill] [--out FILE]
    python scripts/tune_kernels.py --time [--shape "7B at 256k"] [--programs decode] [--out FILE]

A table elsewhere than in pallas_kernels/tuned is used where PALLAS_KERNELS_TUNED names its
directory.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpu_compile import GENERATIONS, Schedule, in_child, memory_of, mesh, schedules
from tpu_schedule import CONTEXT

from pallas_kernels.tiles import PACKAGED

TABLE = PACKAGED / "mosaic_tpu.json"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--generations", default=",".join(GENERATIONS))
    parser.add_argument("--programs", default="prefill,sparse prefill,selection")
    parser.add_argument("--model", default="7B")
    parser.add_argument("--time", action="store_true", help="run them on this machine's TPU")
    parser.add_argument("--shape", default="7B at 256k", help="what is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    programs = args.programs.split(",")
    if args.child:
        for found in compiled(args.child, programs, args.model):
            print(json.dumps(found), flush=True)
        return
    table = json.loads((args.out if args.out.exists() else TABLE).read_text())
    if args.time:
        kind, rows = timed(args.shape, programs, args.repeats)
        # A device that is in no row yet gets one.
        name = next((name for name, row in table.items() if kind in row["device_kinds"]), kind)
        take(table.setdefault(name, {"device_kinds": [kind]}), name, rows)
    else:
        for generation in args.generations.split(","):
            flags = ["--programs", args.programs, "--model", args.model]
            rows = list(in_child(__file__, "--child", generation, *flags))
            take(table[generation], generation, rows)
    args.out.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {args.out}", file=sys.stderr)


def take(row: dict[str, Any], name: str, found: list[dict[str, Any]]) -> None:
    """Puts the best sizes of each program into the row of a device."""
    from pallas_kernels.programs import PROGRAMS

    for program in dict.fromkeys(each["program"] for each in found):
        tried = [each for each in found if each["program"] == program]
        for each in tried:
            print(name, program, each["sizes"], each["says"], flush=True)
        worked = [each for each in tried if each["worth"] is not None]
        if not worked:
            sys.exit(f"{name}: no candidate of {program} works")
        best = max(each["worth"] for each in worked)
        chosen = [each for each in worked if each["worth"] >= each["close"] * best][-1]
        row.setdefault(PROGRAMS[program], {}).update(chosen["sizes"])
        print(name, program, "takes", chosen["sizes"], flush=True)


def candidates(program: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Sizes as the table has them, and as keyword arguments."""
    from pallas_kernels.tiles import Tiles

    for values in itertools.product(*CANDIDATES[program].values()):
        sizes = dict(zip(CANDIDATES[program], values, strict=True))
        yield (
            sizes,
            {k: Tiles(**v) if isinstance(v, dict) else v for k, v in sizes.items()},
        )


def compiled(generation: str, programs: list[str], model: str) -> Iterator[dict[str, Any]]:
    """What the schedules of all candidates are worth on a generation."""
    import jax

    from pallas_kernels.cases import MODELS
    from pallas_kernels.programs import inputs, program

    device = mesh(generation)
    case = MODELS[model].share(CONTEXT, memory_of(device))
    for name in programs:
        args = jax.eval_shape(lambda name=name: inputs(name, case))
        for sizes, keywords in candidates(name):
            worth = None
            try:
                found = schedules(device, program(name, case, "mosaic_tpu", **keywords), *args)
                worth = min(each.mxu for each in found)
                says = "; ".join(map(summary, found))
            except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
                says = str(error).splitlines()[0]
            yield {"program": name, "sizes": sizes, "worth": worth, "says": says, "close": CLOSE}


def summary(found: Schedule) -> str:
    inner = f"inner {found.inner_mxu:.3f}"
    return f"{found.name} MXU {found.mxu:.3f} {inner} spills {found.spills:,}"


def timed(shape: str, programs: list[str], repeats: int) -> tuple[str, list[dict[str, Any]]]:
    """The kind of this machine's TPU, and how fast it runs all candidates."""
    import statistics

    import jax

    from pallas_kernels import backend
    from pallas_kernels.cases import SERVED
    from pallas_kernels.programs import inputs
    from qwen_jax.cli.kernels import time_of

    here = backend.device()
    if here.platform != "tpu":
        sys.exit(f"--time needs a TPU; this is a {here.platform} (leave it out to compile only)")
    rows = []
    for name in programs:
        args = jax.jit(lambda name=name: inputs(name, SERVED[shape]))()
        for sizes, keywords in candidates(name):
            worth = None
            try:
                seconds = time_of(name, SERVED[shape], "mosaic_tpu", args, repeats, **keywords)
                worth = 1 / statistics.median(seconds)
                says = f"{1e3 / worth:.3f} ms"
            except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
                says = str(error).splitlines()[0]
            rows.append(
                {"program": name, "sizes": sizes, "worth": worth, "says": says, "close": 1.0}
            )
    return here.kind, rows


if __name__ == "__main__":
    main()
