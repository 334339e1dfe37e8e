"""Search for sizes of kernels: by compilation without a device, by time on one.

Without a device every candidate is compiled for every device that the backend's compilers know.
Its value is defined in `tune_tpu` and `tune_gpu`; it is a prediction, not a time.

With --time the candidates run on the TPU or GPU of this machine. Those whose results differ from
the reference in float64 are left out, and the one with the lowest median time is taken. Either way
the existing table is read, and the rows that were searched are replaced.

    python scripts/tune_kernels.py --backend triton [--devices h200] [--programs prefill]
    python scripts/tune_kernels.py --time [--shape "7B at 256k"] [--programs decode] [--out FILE]

A table elsewhere than in pallas_kernels/tuned is used where PALLAS_KERNELS_TUNED names its
directory.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tune_gpu
import tune_tpu

from pallas_kernels.dispatch.tiles import PACKAGED

BACKENDS = {"mosaic_tpu": tune_tpu, "triton": tune_gpu}
ROWS = 3  # compared of a prefill


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, default="mosaic_tpu")
    parser.add_argument("--devices", help="default: all that its compilers know")
    parser.add_argument("--programs", help="default: all that the backend's search is for")
    parser.add_argument("--model", default="7B")
    parser.add_argument("--time", action="store_true", help="run them on this machine's device")
    parser.add_argument("--shape", default="7B at 256k", help="what is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: the table that the kernels use")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time:
        args.backend = of_this_machine()
    search = BACKENDS[args.backend]
    programs = args.programs.split(",") if args.programs else list(search.PROGRAMS)
    tried = functools.partial(candidates, search.CANDIDATES)
    if args.child:
        for found in search.compiled(args.child, programs, args.model, tried):
            print(json.dumps(found), flush=True)
        return
    packaged = PACKAGED / f"{args.backend}.json"
    out = args.out or packaged
    table = json.loads((out if out.exists() else packaged).read_text())
    if args.time:
        kind, rows = timed(args.backend, args.shape, programs, args.repeats, tried)
        # A device that is in no row yet gets one.
        name = next((name for name, row in table.items() if kind in row["device_kinds"]), kind)
        take(table.setdefault(name, {"device_kinds": [kind], **search.HEADS}), name, rows)
    else:
        for device in args.devices.split(",") if args.devices else search.DEVICES:
            flags = ["--backend", args.backend, "--programs", ",".join(programs)]
            flags += ["--model", args.model]
            rows = list(search.in_child(__file__, "--child", device, *flags))
            take(table[device], device, rows)
    out.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {out}", file=sys.stderr)


def of_this_machine() -> str:
    """Returns the backend that is tuned on this machine."""
    from pallas_kernels.dispatch import backend

    platform = backend.device().platform
    found = [name for name in BACKENDS if platform in backend.RUNS_ON[name]]
    if not found:
        sys.exit(f"--time needs a TPU or GPU; this is a {platform} (leave it out to compile only)")
    return found[0]


def take(row: dict[str, Any], name: str, found: list[dict[str, Any]]) -> None:
    """Puts the best sizes of each program into the row of a device."""
    for program in dict.fromkeys(each["program"] for each in found):
        tried = [each for each in found if each["program"] == program]
        for each in tried:
            print(name, program, each["sizes"], each["says"], flush=True)
        worked = [each for each in tried if each["worth"] is not None]
        if not worked:
            sys.exit(f"{name}: no candidate of {program} works")
        best = max(each["worth"] for each in worked)
        chosen = [each for each in worked if each["worth"] >= each["close"] * best][-1]
        what = tabled(program)
        row[what] = row.get(what, {}) | chosen["sizes"]
        print(name, program, "takes", chosen["sizes"], flush=True)


def tabled(program: str) -> str:
    """Returns the name of a program in the table."""
    from pallas_kernels.programs import PROGRAMS

    return program if program == "sparse prefill" else PROGRAMS[program]


def candidates(
    table: dict[str, dict[str, list[Any]]], program: str
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields candidate sizes in the form of the table, and as keyword arguments."""
    from pallas_kernels.dispatch.tiles import Tiles

    for values in itertools.product(*table[program].values()):
        sizes = dict(zip(table[program], values, strict=True))
        yield (
            sizes,
            {k: Tiles(**v) if isinstance(v, dict) else v for k, v in sizes.items()},
        )


def timed(
    name: str, shape: str, programs: list[str], repeats: int, candidates
) -> tuple[str, list[dict[str, Any]]]:
    """Times all correct candidates; returns the kind of this machine's device, and rows."""
    import statistics

    import jax
    from bench_gpu_truth import WrongError

    from pallas_kernels.dispatch import backend
    from pallas_kernels.programs import inputs, program
    from qwen_jax.cli.kernels import time_of
    from qwen_jax.planner.shapes import SERVED
    from qwen_jax.sparse import budgets

    here = backend.device()
    case, tiles, rows = SERVED[shape], budgets.tiles_on(here.platform), []
    for what in programs:
        args = jax.jit(lambda what=what: inputs(what, case, tiles=tiles))()
        for sizes, keywords in candidates(what):
            worth = None
            try:
                check(what, case, args, jax.jit(program(what, case, name, **keywords))(*args))
                seconds = time_of(what, case, name, args, repeats, **keywords)
                worth = 1 / statistics.median(seconds)
                says = f"{1e3 / worth:.3f} ms"
            except (NotImplementedError, jax.errors.JaxRuntimeError, WrongError) as error:
                says = str(error).splitlines()[0]
            rows.append(
                {"program": what, "sizes": sizes, "worth": worth, "says": says, "close": 1.0}
            )
    return here.kind, rows


def check(what: str, case, args, found) -> None:
    """Compare some rows, sequences or heads of a result with the truth in float64.

    Raises:
        WrongError: if they differ by more than they may.
    """
    import bench_gpu_truth as truth
    import numpy as np

    rng = np.random.default_rng()
    if what == "decode":
        truth.check_decode(case, args, found, [0])
    elif what == "selection":
        truth.check_votes(case, args, found, [0, case.num_heads - 1])
    elif what == "prefill":
        truth.check_slice(rng, case, args, found, ROWS)
    else:
        listed, *rest = args
        truth.check_slice(rng, case, tuple(rest), found, ROWS, listed)


if __name__ == "__main__":
    main()
