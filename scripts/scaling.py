"""Scaling of a million tokens over devices: the tables and the plot of docs/scaling.md.

The TPU compiler's results for the published models on whole topologies are in
docs/scaling.json; --compile updates them, in half an hour. The tables that follow from sizes and
published rates are computed here. Nothing is run, so no times are measured.

    python scripts/scaling.py [--compile [7b:v5e:4x4:1010000 ...]]
"""

import argparse
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tpu_compile import ENVIRONMENT

from qwen_jax.models import presets
from qwen_jax.planner.devices import DEVICES, topology

DOCS = Path(__file__).parent.parent / "docs"
SLICE = 32_768
MILLION = 1_010_000
CASES = [
    *[("7b", name, MILLION) for name in ("v5e:2x4", "v5e:4x4", "v6e:2x2", "v6e:2x4")],
    *[("7b", name, MILLION) for name in ("v5p:2x2x1", "tpu7x:2x2x1")],
    *[("14b", name, MILLION) for name in ("v5e:8x8", "v6e:4x4", "v5p:2x2x2")],
    *[
        (model, name, tokens)
        for model in ("7b", "14b")
        for name in ("v5e:16x16", "v6e:16x16")
        for tokens in (4_000_000, 10_000_000)
    ],
]
"""Model, topology and tokens of every program that is compiled."""
COLUMNS = {"7b": 22_032, "14b": 15_744}  # most of a head, in the published budgets
# Keys that a query reads in sparse prefill: the mean budgets, if the diagonals of a head lie side
# by side, and what a tile of 1,024 queries and blocks of 128 keys add to them.
SPARSE_KEYS = {"7b": 3929.0 + 7650 + 1152, "14b": 2364.0 + 6055 + 1152}
CONTEXTS = 32_768, 131_072, MILLION, 4_000_000, 10_000_000
COUNTS = 8, 16, 64, 256
SLICES = 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536


@functools.cache
def model(name: str):
    """Returns the configuration of a published model."""
    with tempfile.TemporaryDirectory() as folder:
        return presets.config(Path(folder), name)


def load(
    name: str, mesh, tokens: int, *, sparse: bool, slice_len: int = SLICE, relayouts_weights=False
):
    """Returns the workload of `tokens` tokens of a model on a mesh of TPUs."""
    from qwen_jax.engine import layout

    config = layout.EngineConfig(
        max_len=tokens, slices=(slice_len,), sparse=budgets(name) if sparse else None
    )
    return layout.load(
        model(name),
        config,
        mesh,
        platform="tpu",
        relayouts_weights=relayouts_weights,
        dtype="bfloat16",
    )


def budgets(name: str):
    """Returns budgets of sparse prefill, the same for all heads."""
    from qwen_jax.config import SparseConfig

    config = model(name)
    rows = [((each,) * config.num_heads,) * config.num_layers for each in (COLUMNS[name], 8192)]
    return SparseConfig(vertical=rows[0], slash=rows[1], last_q=64, threshold=0)


def compile_case(name: str, where: str, tokens: int) -> Iterator[dict]:
    """Compiles the programs of a case; yields rows of their memory and collectives."""
    from qwen_jax.distributed import sharding
    from qwen_jax.planner import aot

    config, found = model(name), topology(where)
    mesh = sharding.default_mesh(config, found.count)
    asked = load(name, mesh, tokens, sparse=True)
    for program in aot.programs(config, asked, found, mesh, budgets(name)):
        yield {
            "model": name,
            "topology": where,
            "tokens": tokens,
            "mesh": dataclasses.asdict(mesh),
            "step": program.name,
            "arguments": program.arguments,
            "temporaries": program.temporaries,
            "peak": program.peak,
            "refusal": program.refusal,
            "sent": program.sent,
            "collectives": [[*each, count] for each, count in program.collectives.items()],
        }


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _table(head: str, rows: list[list[str]]) -> list[str]:
    names = head.split(", ")
    return [
        f"| {' | '.join(names)} |",
        "|" + "---|" * len(names),
        *[f"| {' | '.join(row)} |" for row in rows],
    ]


def proofs(found: list[dict]) -> list[str]:
    """Formats a row for each compiled program."""
    from qwen_jax.distributed.sharding import MeshShape
    from qwen_jax.engine import memory as budget

    rows = []
    for each in found:
        mesh, device = MeshShape(**each["mesh"]), topology(each["topology"]).device
        sparse = each["step"] == "prefill_sparse"
        asked = load(
            each["model"], mesh, each["tokens"], sparse=sparse, relayouts_weights=device.relays
        )
        planned = budget.memory(model(each["model"]), asked, mesh).total
        decodes = each["step"] == "decode"
        operations = sum(count for *_, count in each["collectives"])
        rows.append(
            [
                each["model"].upper(),
                each["topology"],
                f"{each['tokens']:,}",
                str(mesh),
                each["step"].replace("_", " "),
                _gib(each["arguments"]),
                _gib(each["temporaries"]),
                _gib(each["peak"]),
                "" if decodes else f"{_gib(planned)} ({planned / each['peak'] - 1:+.1%})",
                _gib(device.memory or 0),
                f"{operations:,}",
                f"{each['sent'] / (1 if decodes else SLICE) / 1e3:,.0f}",
            ]
        )
    return _table(
        "model, topology, tokens, mesh, program, arguments, beside them, at once, planned, HBM, "
        "collectives a step, kB sent a token",
        rows,
    )


def operations(found: list[dict]) -> list[str]:
    """Formats the collectives of one program."""
    (program,) = (
        each
        for each in found
        if (each["model"], each["topology"], each["step"]) == ("7b", "v5e:4x4", "prefill_sparse")
    )
    by_bytes = sorted(program["collectives"], key=lambda item: -item[4] * item[5])
    rows = [
        [f"{count:,}", kind, axes, f"`{shape}`", f"{sent / 1e6:,.3f}", f"{count * sent / 1e6:,.1f}"]
        for kind, axes, shape, _, sent, count in by_bytes
    ]
    return _table("times, operation, axis, of, MB each, MB in all", rows)


def schemes() -> list[str]:
    """Formats bytes sent per token if queries or if keys move, without sums along `tensor`."""
    from qwen_jax.distributed.sharding import MeshShape
    from qwen_jax.planner import roofline

    rows = []
    for name in presets.PUBLISHED:
        config = model(name)
        for seq in (4, 16):
            mesh = MeshShape(seq=seq, tensor=config.num_kv_heads)
            alone = MeshShape(seq=seq, tensor=config.num_kv_heads)
            for tokens in CONTEXTS:
                dense = load(name, mesh, tokens, sparse=False)
                queries, keys = (
                    of(config, dense, alone) - _sums(config, dense, alone)
                    for of in (roofline.slice_sent, roofline.gathered_sent)
                )
                rows.append(
                    [
                        name.upper(),
                        str(mesh),
                        f"{tokens:,}",
                        f"{queries / SLICE / 1e3:,.0f}",
                        f"{keys / SLICE / 1e3:,.0f}",
                        f"{keys / queries:.2f}",
                    ]
                )
    return _table("model, mesh, context, kB if queries move, kB if keys move, ratio", rows)


def _sums(config, asked, mesh) -> float:
    """Returns the bytes that a slice sends along `tensor`."""
    from qwen_jax.distributed.sharding import MeshShape
    from qwen_jax.planner import roofline

    part = dataclasses.replace(asked, slice_len=asked.slice_len // mesh.seq, columns=None)
    return roofline.slice_sent(config, part, MeshShape(tensor=mesh.tensor))


def _fits(config, asked, mesh, device) -> bool:
    from qwen_jax.engine import memory as budget

    return budget.memory(config, asked, mesh).total <= device.memory


def _cost(name: str, kind: str, count: int, tokens: int, *, sparse: bool, slice_len: int = SLICE):
    """Computes the cost of the last slice; None if it does not fit."""
    from qwen_jax.distributed import sharding
    from qwen_jax.planner import roofline

    config, device = model(name), DEVICES[kind]
    mesh = sharding.default_mesh(config, count)
    relayouts_weights = device.relays
    asked = load(
        name, mesh, tokens, sparse=sparse, slice_len=slice_len, relayouts_weights=relayouts_weights
    )
    if slice_len > tokens or not _fits(config, asked, mesh, device):
        return None
    return roofline.of_slice(config, asked, mesh, SPARSE_KEYS[name] if sparse else None)


def _decode_cost(name: str, kind: str, count: int, tokens: int):
    from qwen_jax.distributed import sharding
    from qwen_jax.planner import roofline

    config = model(name)
    mesh = sharding.default_mesh(config, count)
    asked = load(name, mesh, tokens, sparse=False)
    return (
        roofline.of_token(config, asked, mesh)
        if _fits(config, asked, mesh, DEVICES[kind])
        else None
    )


def growth(kind: str = "v5e") -> list[str]:
    """Formats the cost per device of a token of the last slice, and its bottleneck."""
    words = "FLOPs", "memory", "wire"
    rows = []
    for name in presets.PUBLISHED:
        for tokens in CONTEXTS:
            for count in COUNTS:
                cells = []
                for sparse in (False, True):
                    cost = _cost(name, kind, count, tokens, sparse=sparse)
                    if cost is None:
                        cells += ["", "", "", ""]
                        continue
                    times = cost.seconds(DEVICES[kind])
                    cells += [
                        f"{cost.flops / SLICE / 1e9:,.2f}",
                        f"{cost.memory / SLICE / 1e6:,.2f}",
                        f"{cost.sent / SLICE / 1e3:,.0f}",
                        f"{1e6 * max(times) / SLICE:,.1f} us, {words[times.index(max(times))]}",
                    ]
                step = _decode_cost(name, kind, count, tokens)
                if step is None:
                    cells += ["", ""]
                else:
                    times = step.seconds(DEVICES[kind])
                    cells += [
                        f"{step.memory / 1e9:,.2f}",
                        f"{1e3 * max(times):,.2f} ms, {words[times.index(max(times))]}",
                    ]
                if any(cells):
                    rows.append([name.upper(), f"{tokens:,}", f"{count}", *cells])
    return _table(
        "model, context, devices, dense GFLOP, MB of memory, kB sent, least time, "
        "sparse GFLOP, MB of memory, kB sent, least time, decode GB of memory, least time",
        rows,
    )


def turning_points() -> list[str]:
    """Formats the number of devices from which communication takes longer than FLOPs.

    A mesh axis is taken to use the links of one dimension of the torus.
    """
    rows = []
    for name in presets.PUBLISHED:
        for kind in ("v5e", "v6e", "v5p", "tpu7x"):
            device = DEVICES[kind]
            for sparse in (False, True):
                cells = []
                for tokens in CONTEXTS:
                    counts = [2**power for power in range(2, 13)]
                    costs = {
                        each: _cost(name, kind, each, tokens, sparse=sparse) for each in counts
                    }
                    times = {
                        each: cost.seconds(device)
                        for each, cost in costs.items()
                        if cost is not None
                    }
                    late = [
                        each
                        for each, (flops, _, wire) in times.items()
                        if wire * device.dims > flops
                    ]
                    cells.append(f"{min(late)}" if late else "over 4096" if times else "")
                rows.append([name.upper(), kind, "sparse" if sparse else "dense", *cells])
    heads = ", ".join(
        f"{each // 1000}k" if each < 10**6 else f"{each / 1e6:.3g}M" for each in CONTEXTS
    )
    return _table(f"model, TPU, prefill, {heads}", rows)


def slices(kind: str = "v5e") -> list[str]:
    """Formats the shortest slice within 10% of the minimum time per token, and its time.

    Each is centred at the context, so that long ones do not gain by their early tokens.
    """
    rows = []
    for name, count in (("7b", 16), ("14b", 64), ("7b", 256), ("14b", 256)):
        for tokens in CONTEXTS:
            cells = []
            for sparse in (False, True):
                times = {}
                for size in SLICES:
                    end = tokens + size // 2
                    cost = _cost(name, kind, count, end, sparse=sparse, slice_len=size)
                    if cost is not None:
                        times[size] = max(cost.seconds(DEVICES[kind])) / size
                if not times:
                    cells += ["", ""]
                    continue
                best = min(size for size in times if times[size] <= 1.1 * min(times.values()))
                cells += [f"{best:,}", f"{best * times[best]:,.2f}"]
            rows.append([name.upper(), f"{count}", f"{tokens:,}", *cells])
    return _table("model, devices, context, dense, s a slice, sparse, s a slice", rows)


def plot(path: Path, kind: str = "v5e") -> None:
    """Plots the three minimum times of a token of 7B over devices, and over context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    counts, contexts = [2**power for power in range(3, 9)], [2**power for power in range(15, 24)]
    lines = (
        (panes[0], "devices, 1,010,000 tokens", counts, lambda x: (x, MILLION)),
        (panes[1], "tokens of context, 256 devices", contexts, lambda x: (256, x)),
    )
    for pane, label, values, of in lines:
        for sparse, style in ((False, "-"), (True, "--")):
            costs = [_cost("7b", kind, *of(value), sparse=sparse) for value in values]
            for index, (what, color) in enumerate(
                (("FLOPs", "tab:blue"), ("memory", "tab:green"), ("links", "tab:red"))
            ):
                times = [
                    float("nan")
                    if cost is None
                    else 1e6 * cost.seconds(DEVICES[kind])[index] / SLICE
                    for cost in costs
                ]
                how = "sparse" if sparse else "dense"
                pane.plot(values, times, style, color=color, marker=".", label=f"{what}, {how}")
        pane.set(xscale="log", yscale="log", xlabel=label)
        pane.grid(alpha=0.3)
    panes[0].set_ylabel("µs a token of the last slice, at published rates")
    panes[0].legend(fontsize=8)
    figure.suptitle(f"Prefill of Qwen2.5-7B-1M on {kind}, a device")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def filled(text: str, found: list[dict]) -> str:
    """Replaces every table of a text between its marks."""
    for name, lines in (
        ("proofs", proofs(found)),
        ("operations", operations(found)),
        ("schemes", schemes()),
        ("growth", growth()),
        ("turning points", turning_points()),
        ("slices", slices()),
    ):
        begins, ends = f"<!-- {name} -->\n", "<!-- end -->"
        head, rest = text.split(begins)
        text = head + begins + "\n".join(lines) + "\n" + rest[rest.index(ends) :]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compile", nargs="*", metavar="MODEL:TOPOLOGY:TOKENS")
    args = parser.parse_args()
    data = DOCS / "scaling.json"
    found = json.loads(data.read_text()) if data.exists() else []
    for case in CASES if args.compile is not None else ():
        if args.compile and ":".join(map(str, case)) not in args.compile:
            continue
        made = list(compile_case(*case))
        others = [
            each for each in found if (each["model"], each["topology"], each["tokens"]) != case
        ]
        found = sorted(
            others + made,
            key=lambda each: CASES.index((each["model"], each["topology"], each["tokens"])),
        )
        lines = ",\n".join(json.dumps(each) for each in found)
        data.write_text(f"[\n{lines}\n]\n")
        print(*case, flush=True)
    page = DOCS / "scaling.md"
    page.write_text(filled(page.read_text(), found))
    plot(DOCS / "scaling.png")


if __name__ == "__main__":
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    main()
