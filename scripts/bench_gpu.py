"""Attention on an NVIDIA GPU: every backend checked against float64, then timed beside others.

    python3 scripts/bench_gpu.py [--sections prefill,decode] [--backends triton] [--out FILE.jsonl]
    python3 scripts/bench_gpu.py --dry-run

Needs jax for CUDA, jaxtyping, this repository and what its backends need, such as jax-triton; also
PyTorch where it is to be compared with. Writes a line of JSON a figure, to FILE or in between, and
last a table and the targets. What cannot run is a row with its reason. Exits with 1 if a result was
wrong, if a check failed otherwise, or if a backend that is to be timed passed none.

Checks. Before anything is timed every backend runs small and medium shapes on fresh random values,
the seed of which is printed, and again each shape that is timed, of which a few rows are compared.
The truth is computed in float64, from the definition (`bench_gpu_truth`). Rows of the cache that no
token wrote hold NaN, and pages lie in random order. What was wrong once is not timed.

Time. A call is compiled, run once for every set of inputs, and once more to see how long it takes.
Then groups of as many calls as fill `Sizes.group_seconds` are enqueued one after another, and only
the last is waited for: work of one stream ends in the order in which it was enqueued, so a call
takes the time of its group over the number of its calls. The figure is the median of the groups;
all of them are in the JSON, and `enqueued`, the seconds that the host takes for a call while the
queue is not full: where that is about as much, the host was timed, and the table says so. Calls
take turns through sets of inputs, together larger than the cache of a GPU. PyTorch is timed the
same way. Decode takes so little that it runs `CALLS` times in one program, each time on the next
layer of the cache, its queries being the output of the time before, lest they overlap.

Rates. Attention counts 4 x heads x head_dim FLOP for each causal pair; decode the bytes of keys and
values that it must read. Ceilings are those of the same run: a product of bfloat16 matrices, and a
copy, counted as bytes read plus bytes written.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# jax takes what it may at once; the rest is for PyTorch and for the libraries of both.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from bench_gpu_inputs import REAL, SETS, TINY, Draw, Sizes, served  # noqa: E402
from bench_gpu_rivals import RIVALS, pytorch, unpaged  # noqa: E402
from bench_gpu_truth import (  # noqa: E402
    TOLERANCE,
    Args,
    WrongError,
    attention,
    check_decode,
    check_slice,
    check_votes,
    compare,
    some_rows,
)

from pallas_kernels import plan  # noqa: E402
from pallas_kernels.cases import CASES, Case, Served  # noqa: E402
from pallas_kernels.dispatch import backend  # noqa: E402
from pallas_kernels.dispatch.tiles import Tiles  # noqa: E402
from pallas_kernels.prefill import prefill  # noqa: E402
from pallas_kernels.programs import VOTERS, program  # noqa: E402
from pallas_kernels.select import Votes, select_keys, vote  # noqa: E402
from qwen_jax.planner.shapes import SERVED  # noqa: E402

MOST_CALLS = 512  # of a group
QUEUED = 16  # calls that fit a queue: jax waits for the GPU at 32
CALLS = 8  # of decode in a program
ROWS = 3  # compared of a shape that is timed
PACKAGES = "jax jaxlib jax-triton triton torch numpy nvidia-cudnn-cu13".split()
TFLOPS, GBPS = "TFLOP/s", "GB/s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: all")
    parser.add_argument("--backends", help="default: all that run here; of these xla is not timed")
    parser.add_argument("--out", type=Path, help="file for the lines of JSON; default: print them")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument("--commit", default=commit(), help="for where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU too")
    args = parser.parse_args(argv)
    here = backend.device()
    if here.platform != "gpu" and not args.dry_run:
        parser.error(f"no GPU here but a {here.platform}; --dry-run shows that the script works")
    present = [each for each in backend.on(here.platform) if each != "reference"]
    sections = args.sections.split(",")
    checked = args.backends.split(",") if args.backends else present
    for asked, there in (sections, SECTIONS), (checked, present):
        if not set(asked) <= set(there):
            parser.error(f"{', '.join(asked)}: there are {', '.join(there)}")
    # XLA takes minutes for what a kernel does in one, so that it is timed if asked for only.
    timed = checked if args.backends else [each for each in checked if each != "xla"] or checked
    about = {
        "device": here.kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": args.commit,
        "seed": args.seed,
        "dry_run": args.dry_run,
        "versions": versions(),
    }
    print(f"{here.kind}, seed {args.seed}, commit {args.commit}", flush=True)
    if args.out:
        args.out.write_text("")
    bench = Bench(TINY if args.dry_run else REAL, checked, timed, about, args.out)
    for name in dict.fromkeys(["correct", *sections]):
        begin = time.perf_counter()
        SECTIONS[name](bench)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    print_table(bench)
    print_targets(bench)
    return 0 if proven(bench) else 1


class Bench:
    """State of a benchmark: settings, and the rows measured so far.

    Attributes:
        checked: backends to check, of which those in `timed` are timed.
        wrong: reason why a program of a backend is not timed.
    """

    def __init__(
        self,
        sizes: Sizes,
        checked: list[str],
        timed: list[str],
        about: dict[str, Any],
        out: Path | None,
    ):
        self.sizes, self.checked, self.timed = sizes, checked, timed
        self.draw = Draw(about["seed"])
        self.rows: list[dict[str, Any]] = []
        self.wrong: dict[tuple[str, str], str] = {}
        self._about, self._out = about, out

    def add(self, section: str, figure: str, who: str, value: float | None, unit: str, **more: Any):
        row = {"section": section, "figure": figure, "who": who, "value": value, "unit": unit}
        self.rows.append(row | more)
        line = json.dumps(row | more | self._about)
        if self._out is None:
            print(line, flush=True)
        else:
            with self._out.open("a") as file:
                file.write(line + "\n")

    def row(self, section: str, figure: str, who: str) -> dict[str, Any]:
        """Returns the row of that name, or one without a value."""
        for row in self.rows:
            if (row["section"], row["figure"], row["who"]) == (section, figure, who):
                return row
        return {"value": None}

    def attempt(self, section: str, figure: str, who: str, unit: str, measure: Callable) -> None:
        """Adds a row with what `measure` returns, a value and more, or with its error."""
        try:
            value, more = measure()
        except Exception as error:  # whatever it is, the other rows are worth having
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return self.add(section, figure, who, None, unit, reason=reason[:300])
        return self.add(section, figure, who, value, unit, **more)

    def ratio(
        self, section: str, figure: str, who: str, over: str, under: str, factor: float = 1.0
    ):
        """Adds a row with the ratio of the times of two others."""

        def measure():
            a, b = (self.row(section, each, who).get("seconds") for each in (over, under))
            if a is None or b is None:
                raise LookupError(f"{over if a is None else under} was not timed")
            return factor * a / b, {}

        self.attempt(section, figure, who, "", measure)

    def time(
        self, call: Callable, sets: Sequence[Args], wait: Callable = jax.block_until_ready
    ) -> dict[str, Any]:
        """Times a call, in seconds; see the top of this file."""
        for args in sets:
            wait(call(*args))
        begin = time.perf_counter()
        wait(call(*sets[0]))
        once = time.perf_counter() - begin
        calls = int(min(max(self.sizes.group_seconds / once, 1), MOST_CALLS))
        turns, groups, enqueued = itertools.cycle(sets), [], []
        for _ in range(self.sizes.groups):
            out, early = None, min(calls, QUEUED)
            begin = time.perf_counter()
            for i, args in enumerate(itertools.islice(turns, calls), 1):
                out = call(*args)
                if i == early:
                    enqueued.append((time.perf_counter() - begin) / early)
            wait(out)
            groups.append((time.perf_counter() - begin) / calls)
        return {
            "seconds": statistics.median(groups),
            "groups": groups,
            "calls": calls,
            "enqueued": statistics.median(enqueued),
        }

    def ours(
        self,
        section: str,
        figure: str,
        needs: Sequence[str],
        unit: str,
        make: Callable[[str], Callable],
        sets: Sequence[Args],
        worth: Callable[[float], float],
        check: Callable[[Any], dict[str, float]],
        **more: Any,
    ) -> None:
        """Adds a row for each backend.

        Args:
            needs: programs that must not have been wrong before; `check` blames the last one.
            unit: unit of the value.
            make: returns the compiled function of a backend.
            sets: sets of inputs, which calls take in turn.
            worth: converts seconds per call to the unit.
            check: compares the result of the first set of inputs; returns fields of the row.
        """

        def measure(name):
            for each in needs:
                if (name, each) in self.wrong:
                    raise WrongError(f"{each} was wrong: {self.wrong[name, each]}")
            call = make(name)
            try:
                errors = check(call(*sets[0]))
            except WrongError as error:
                self.wrong[name, needs[-1]] = f"{section}, {figure}: {error}"
                raise
            found = self.time(call, sets)
            return worth(found["seconds"]), found | errors | more

        for name in self.timed:
            self.attempt(section, figure, name, unit, functools.partial(measure, name))


def compiled(call: Callable) -> Callable:
    return jax.jit(call, compiler_options=backend.compiler_options(backend.device().platform))


def milliseconds(seconds: float) -> float:
    return 1e3 * seconds


def tokens(count: int) -> str:
    return f"{count:,} tokens"


def correct(bench: Bench) -> None:
    """Checks every program of every backend on small and medium shapes."""
    sizes = bench.sizes
    shapes: list[tuple[str, Case, int]] = [
        (name, CASES.get(name) or SERVED[name], 10_000) for name in sizes.checks
    ]
    if sizes.medium:
        shapes.append(("borders of chunks", sizes.medium, 24))
    for (name, case, most), dtype in itertools.product(shapes, TOLERANCE):
        for what, shape, args, check in checks(bench, case, dtype, most):
            figure = f"{what}, {name}, {dtype}"

            def measure(who, what=what, shape=shape, args=args, check=check):
                with jax.default_matmul_precision("highest"):  # lest XLA takes TF32 for float32
                    found = compiled(program(what, shape, who))(*args)
                errors = check(found)
                return max(errors.values()), errors

            for who in bench.checked:
                bench.attempt("correct", figure, who, "error", functools.partial(measure, who))
                reason = bench.rows[-1].get("reason", "")
                if reason.startswith(WrongError.__name__):
                    bench.wrong.setdefault((who, what), f"{figure}: {reason}")


def proven(bench: Bench) -> bool:
    """Returns True if no result was wrong, and every timed backend passed a check, failing none."""
    checked = [row for row in bench.rows if row["section"] == "correct"]
    passed = {row["who"] for row in checked if row["value"] is not None}
    failed = any(
        row["value"] is None and not row["reason"].startswith(backend.Unsupported.__name__)
        for row in checked
    )
    return not bench.wrong and not failed and passed >= set(bench.timed)


def checks(
    bench: Bench, case: Case, dtype: str, most: int
) -> Iterator[tuple[str, Served, Args, Callable]]:
    """Yields programs with their shape and inputs, and the function that checks their results."""
    draw, T, page = bench.draw, case.slice_len, case.page
    shape = served(
        case,
        context=case.context if isinstance(case, Served) else 6 * T + 3,
        page=page,
        num_seqs=3,
        geometry=case.geometry,
        slice_len=T,
        num_layers=2,
        num_columns=11,
    )
    (args,) = draw.slices(shape, dtype, sets=1, padding=3)
    check = functools.partial(check_slice, draw.rng, shape, args, most=most)
    yield "prefill", shape, args, check

    tiles = Tiles(min(T, bench.sizes.tiles.q), math.gcd(page, bench.sizes.tiles.k))
    listed = draw.plan(shape, int(args[-2]), int(args[-1]), tiles, share=0.3)
    check = functools.partial(check, listed=listed)
    yield "sparse prefill", shape, (listed, *args), check

    voting = (draw.queries(case, dtype, min(T, VOTERS)), *args[1:])
    check = functools.partial(check_votes, shape, voting, heads=sorted({0, case.num_heads - 1}))
    yield "selection", shape, voting, check

    # Of three sequences one is whole, one idle, and one ends early with an idle token.
    cache, tables = draw.paged(shape, dtype, 3)
    ends = np.array([[shape.context], [0], [shape.context // 2]])
    positions = ends - 4 + np.arange(4)
    positions[1], positions[2, -1] = -1, -1
    decoding = (
        draw.queries(case, dtype, 3, 4),
        *(cache, jnp.int32(1), tables),
        jnp.asarray(positions, jnp.int32),
    )
    yield (
        "decode",
        shape,
        decoding,
        functools.partial(check_decode, shape, decoding, sequences=range(3)),
    )


def ceilings(bench: Bench) -> None:
    draw, n, size = bench.draw, bench.sizes.matrix, bench.sizes.copied

    def product():
        sets = [tuple(draw.normal("bfloat16", n, n) for _ in range(2)) for _ in range(SETS)]
        found = bench.time(compiled(jnp.dot), sets)
        return 2 * n**3 / found["seconds"] / 1e12, found

    def copy(found):
        return 2 * size / found["seconds"] / 1e9, found

    def by_jax():
        x = jax.random.bits(draw.key(), (size // 4,))
        return copy(bench.time(compiled(lambda x: x + jnp.uint32(1)), [(x,)]))

    def by_torch():
        torch, device, wait = pytorch()
        x = torch.randint(2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
        return copy(bench.time(torch.empty_like(x).copy_, [(x,)], wait))

    bench.attempt("ceilings", f"product of {n} x {n}", "jax", TFLOPS, product)
    bench.attempt("ceilings", "copy", "jax", GBPS, by_jax)
    bench.attempt("ceilings", "copy", "torch", GBPS, by_torch)


def flops(case: Served, args: Args) -> float:
    """Counts the FLOPs of attention over all causal pairs of a slice."""
    start, length = (int(x) for x in args[-2:])
    pairs = length * start + length * (length + 1) / 2
    return 4 * case.num_heads * case.head_dim * pairs


def dense(bench: Bench, section: str, figure: str, case: Served, sets: list[Args]) -> None:
    work = flops(case, sets[0])
    bench.ours(
        section,
        figure,
        ["prefill"],
        TFLOPS,
        lambda name: compiled(program("prefill", case, name)),
        sets,
        lambda seconds: work / seconds / 1e12,
        functools.partial(check_slice, bench.draw.rng, case, sets[0], most=ROWS),
    )


def whole_prompts(bench: Bench) -> None:
    """Times prompts prefilled at once, without Dual Chunk Attention."""
    sizes = bench.sizes
    for length in sizes.prompts:
        case = sizes.case(length, length, chunks=False)
        sets = bench.draw.slices(case, sizes.dtype)
        dense(bench, "prefill", tokens(length), case, sets)
        plain = [unpaged(args) for args in sets]

        def measure(make, case=case, sets=sets, plain=plain):
            rival = make(plain)
            q, *where, _, length = sets[0]
            rows = some_rows(bench.draw.rng, int(length), ROWS)
            truth, _ = attention(q[:, rows], tuple(where), rows, None)
            nothing = np.zeros(truth.shape[:2])
            found = rival.rows(rival.call(*rival.sets[0]), rows)
            errors = compare((found, nothing), (truth, nothing), str(q.dtype))
            found = bench.time(rival.call, rival.sets, rival.wait)
            return flops(case, sets[0]) / found["seconds"] / 1e12, found | errors | rival.more

        for who, make in RIVALS.items():
            bench.attempt("prefill", tokens(length), who, TFLOPS, functools.partial(measure, make))


def chunks(bench: Bench) -> None:
    """Times a slice at the end of a context, with and without Dual Chunk Attention."""
    sizes = bench.sizes
    for figure in ("in chunks", "in one window"):
        case = sizes.case(sizes.context, sizes.slice_len, chunks=figure == "in chunks")
        dense(bench, "dca", figure, case, bench.draw.slices(case, sizes.dtype, sets=2))
    for name in bench.timed:
        bench.ratio("dca", "chunks over one window", name, "in one window", "in chunks")


def sparse(bench: Bench) -> None:
    """Times prompts prefilled at once by plans of random blocks, and densely."""
    sizes = bench.sizes
    for length in sizes.sparse:
        whole = sizes.case(length, length, chunks=False)
        case = dataclasses.replace(whole, num_columns=0)
        sets = bench.draw.slices(case, sizes.dtype)
        names = tokens(length), f"{tokens(length)} by a plan"
        dense(bench, "sparse", names[0], case, sets)
        listed = bench.draw.plan(case, 0, length, sizes.tiles, sizes.share)
        density = float(plan.density(listed, *sets[0][-2:]).mean())
        bench.ours(
            "sparse",
            names[1],
            ["sparse prefill"],
            "ms",
            lambda name, case=case: compiled(program("sparse prefill", case, name)),
            [(listed, *args) for args in sets],
            milliseconds,
            functools.partial(check_slice, bench.draw.rng, case, sets[0], most=ROWS, listed=listed),
            density=density,
        )
        for name in bench.timed:
            bench.ratio("sparse", f"{names[1]}, share of ideal", name, *names, density)


def budgets(bench: Bench) -> None:
    """Times a slice at the end of a context by published budgets, selection included.

    Each head has the mean budgets of all heads. Random keys get about equal votes, so that each
    selected diagonal is isolated, the worst case for blocks: `scattered`. `clustered`
    adds, as scripts/density.py does, votes that fall with the distance and that runs of 64
    neighbours share. Real texts lie between.
    """
    sizes, draw = bench.sizes, bench.draw
    case = sizes.case(sizes.context, sizes.slice_len, chunks=True)
    slices = draw.slices(case, sizes.dtype, sets=2)
    dense(bench, "budgets", "all keys", case, slices)
    shape = case.num_heads, slices[0][3].size * case.page
    vertical, slash = (jnp.full(shape[0], x, jnp.int32) for x in (sizes.vertical, sizes.slash))
    voters = [draw.queries(case, sizes.dtype, min(case.slice_len, VOTERS)) for _ in slices]

    def choice(name, added, voters, queries, cache, layer, table, start, length):
        at = table, start, length
        votes = vote(voters, cache, layer, *at, geometry=case.geometry, backend_name=name)
        votes = Votes(*(x + y for x, y in zip(votes, added, strict=True)))
        return plan.build(
            *select_keys(votes, start + length, vertical, slash),
            start,
            length,
            num_queries=case.slice_len,
            num_columns=case.num_columns,
            tiles=sizes.tiles,
        )

    def attend(name, added, voters, *args):
        listed = choice(name, added, voters, *args)
        found = prefill(*args, geometry=case.geometry, plan=listed, backend_name=name)
        return *found, listed

    @functools.cache
    def run(what, name):
        return compiled(functools.partial(what, name))

    def check(found):
        *found, listed = found
        density = float(plan.density(listed, *slices[0][-2:]).mean())
        return check_slice(draw.rng, case, slices[0], found, ROWS, listed) | {"density": density}

    voting = [(q, *args[1:]) for q, args in zip(voters, slices, strict=True)]
    bench.ours(
        "budgets",
        "votes",
        ["selection"],
        "ms",
        lambda name: compiled(program("selection", case, name)),
        voting,
        milliseconds,
        functools.partial(check_votes, case, voting[0], heads=[shape[0] - 1]),
    )
    for kind in ("clustered", "scattered"):
        figures = f"{kind}, selection", f"{kind}, selection and prefill"
        added = (jnp.zeros(shape),) * 2
        if kind == "clustered":
            added = tuple(draw.clustered(shape, case.context) for _ in range(2))
        sets = [(added, q, *args) for q, args in zip(voters, slices, strict=True)]
        for figure, what in zip(figures, (choice, attend), strict=True):
            needs = ["selection", "sparse prefill"][: 1 + (what is attend)]
            bench.ours(
                "budgets",
                figure,
                needs,
                "ms",
                functools.partial(run, what),
                sets,
                milliseconds,
                check if what is attend else lambda _: {},
            )
        for name in bench.timed:
            bench.ratio("budgets", f"{kind}, share of all keys", name, figures[1], "all keys")
            density = bench.row("budgets", figures[1], name).get("density")
            if density is not None:
                bench.add("budgets", f"{kind}, density", name, density, "")


def decode(bench: Bench) -> None:
    """Times decoding the next token of sequences of one length, each with its own pages."""
    sizes = bench.sizes
    for context, seqs, layers in sizes.decode:
        case = sizes.case(context, 1, chunks=True, layers=layers, seqs=seqs)
        cache, tables = bench.draw.paged(case, sizes.dtype, seqs)
        q = bench.draw.queries(case, sizes.dtype, seqs, 1)
        positions = jnp.full((seqs, 1), context - 1, jnp.int32)
        args = q, cache, jnp.int32(0), tables, positions
        read = CALLS * seqs * context * 2 * case.num_kv_heads * case.head_dim * q.dtype.itemsize

        def check(found, case=case, args=args, seqs=seqs):
            return check_decode(case, args, found[0], sorted({0, seqs - 1}))

        bench.ours(
            "decode",
            f"{tokens(context)} x {seqs}",
            ["decode"],
            GBPS,
            lambda name, case=case: compiled(repeated(program("decode", case, name), case)),
            [args],
            lambda seconds, read=read: read / seconds / 1e9,
            check,
            decodes=CALLS,
        )


def repeated(run: Callable, case: Served) -> Callable:
    """Returns a function that decodes on layer after layer and returns first and last result."""

    def many(q, cache, layer, tables, positions):
        found = first = run(q, cache, layer, tables, positions)
        for i in range(1, CALLS):
            q = jnp.broadcast_to(found[0], q.shape)
            found = run(q, cache, jnp.int32(i % case.num_layers), tables, positions)
        return first, found

    return many


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "correct": correct,
    "ceilings": ceilings,
    "prefill": whole_prompts,
    "dca": chunks,
    "sparse": sparse,
    "budgets": budgets,
    "decode": decode,
}


def targets(bench: Bench) -> Iterator[tuple[str, str, float | None, str, float]]:
    """Yields the name, backend, measured value, comparison and bound of each target."""
    sizes = bench.sizes

    def value(section, figure, who):
        return bench.row(section, figure, who)["value"]

    def ratio(a, b):
        return None if a is None or b is None else a / b

    copies = [value("ceilings", "copy", who) for who in ("jax", "torch")]
    copy = max((each for each in copies if each is not None), default=None)
    for name in bench.timed:
        found = value("prefill", tokens(sizes.prompt), name)
        yield f"prefill of {tokens(sizes.prompt)}, {TFLOPS}", name, found, ">=", 380
        for length in sizes.prompts:
            found = (value("prefill", tokens(length), who) for who in (name, "torch flash"))
            yield f"prefill of {tokens(length)}, over torch flash", name, ratio(*found), ">=", 1
        found = value("dca", "chunks over one window", name)
        yield "rate in chunks over that in one window", name, found, ">=", 0.95
        for length in sizes.sparse:
            found = value("sparse", f"{tokens(length)} by a plan, share of ideal", name)
            yield f"sparse prefill of {tokens(length)}, share of ideal", name, found, ">=", 0.76
        found = value("budgets", "clustered, share of all keys", name)
        yield "published budgets, clustered, share of all keys", name, found, "<=", 0.15
        for context, seqs, _ in sizes.decode:
            found = ratio(value("decode", f"{tokens(context)} x {seqs}", name), copy)
            yield f"decode of {tokens(context)} x {seqs}, over copy", name, found, ">=", 0.85


def print_targets(bench: Bench) -> None:
    if bench.sizes is TINY:
        print("\nA dry run: none of these figures means anything, nor do targets.")
    else:
        print()
    for text, name, found, sign, bound in targets(bench):
        reached = None
        if found is not None:
            reached = found >= bound if sign == ">=" else found <= bound
        more = {"bound": f"{sign} {bound}", "reached": reached}
        bench.add("targets", text, name, found, "", **more)
        verdict = {True: "reached", False: "NOT reached", None: "not measured"}[reached]
        said = "" if found is None else f" {found:.3f}"
        print(f"{text}, {name}:{said} (target {sign} {bound}): {verdict}")


def print_table(bench: Bench) -> None:
    """Prints figures by backend, then the reasons of missing ones."""
    checked = [row for row in bench.rows if row["section"] == "correct"]
    right = sum(row["value"] is not None for row in checked)
    print(f"\n{right} of {len(checked)} checks passed")
    found = [row for row in bench.rows if row["section"] != "correct"]
    columns = list(dict.fromkeys([*bench.timed, *(row["who"] for row in found)]))
    if found:
        print(f"\n| figure | unit | {' | '.join(columns)} |")
        print("|---" * (len(columns) + 2) + "|")
    for section, figure, unit in dict.fromkeys(
        (row["section"], row["figure"], row["unit"]) for row in found
    ):
        cells = (cell(bench.row(section, figure, who)) for who in columns)
        print(f"| {section}: {figure} | {unit} | {' | '.join(cells)} |")
    print()
    for row in bench.rows:
        if row["value"] is None:
            print(f"{row['section']}, {row['figure']}, {row['who']}: {row['reason']}")


def cell(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "-" if "reason" in row else ""
    by_host = row.get("enqueued", 0) > 0.9 * row.get("seconds", math.inf) and row["calls"] > 1
    return f"{row['value']:.4g}" + (" (host)" if by_host else "")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
