"""doctor --kernels: correctness and speed of the attention kernels on this device."""

import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import check
from pallas_kernels.cases import Served
from pallas_kernels.check import Result, Shape
from pallas_kernels.dispatch import backend
from pallas_kernels.programs import DENSE, PROGRAMS
from qwen_jax.cli import kernels, placement
from qwen_jax.cli.flags import ModelFlags
from qwen_jax.cli.plan import opened_or_published
from qwen_jax.config import ConfigError
from qwen_jax.distributed.jax_settings import own_settings
from qwen_jax.engine import first_contact
from qwen_jax.engine.layout import EngineConfig, EngineLayout
from qwen_jax.files import reading
from qwen_jax.planner import devices
from qwen_jax.storage import atomic

FORMAT = "qwen-jax kernel report 1"
REPEATS = 5
_BYTES = 16 << 20
# Rows of a matrix and bytes of a copy, large enough for the device to be busy.
_MATRIX = {"cpu": 1024}, 8192
COPIED_BYTES = {"cpu": 1 << 25}, 1 << 30
_PATH = re.compile(r"""(?<![/:\w])~?(?:/[^\s/'":,;()<>]+)*/(?=[^\s/])""")


@own_settings()
def show(
    names: list[str],
    *,
    model: Path | None,
    config: str | None,
    report: Path | None,
    facts: Callable[[], dict[str, Any]],
    json_output: bool,
) -> int:
    """Compares and times kernels, prints both and writes them into a file.

    Args:
        names: names of backends; [] for the preferred ones of the device.
        model: checkpoint with the shapes; None for the published model `config`, or 7B
            if that is None too.
        report: JSON file to write; None for none.
        facts: returns the other output of `doctor`.
        json_output: print JSON instead of tables.

    Returns:
        1 if a kernel does not agree with the truth, else 0.

    Raises:
        ConfigError: if there is no device or a flag cannot be used.
        OSError: if the file cannot be written.
        Unsupported: if a backend does not run here.
    """
    placement.one_process("kernels are compared")
    if report is not None:
        _check_report(report)
    device = devices.found()[0]
    shape, served = shapes(device, model, config)
    choices = _choices(device, shape, names)
    say = (lambda *text: None) if json_output else functools.partial(print, flush=True)
    say(_headline(shape, device))
    results = []
    say(_row("program", "kernels", "tokens", "compared with", "error", "log-sum-exp", "verdict"))
    for chosen in choices:
        found = []
        for result in first_contact.compare(shape, chosen, device):
            found.append(result)
            say(_row(*_of_result(result)))
        _keep(shape, chosen, found, device)
        results += found
    wrong = [each for each in results if each.verdict != "agrees"]
    for each in wrong:
        say(f"{each.program} by {each.backend}, {each.context:,} tokens: {each.reason}")
    say()
    limits = ceilings(device.platform)
    for what, value in limits.items():
        say(f"{what}: {kernels.FULL if value is None else f'{value:,.1f}'}")
    right = dict.fromkeys(each.backend for each in results)
    right = [name for name in right if name not in {each.backend for each in wrong}]
    say(_row("program", "kernels", "tokens", "ms (median)", "rate", "of ceiling", ""))
    speeds = []
    for row in speeds_of(served, right, limits):
        speeds.append(row)
        say(_row(*_of_speed(row)))
    content = {
        "format": FORMAT,
        "device": {"platform": device.platform, "kind": device.device_kind},
        "versions": {
            "qwen-jax": importlib.metadata.version("qwen-jax"),
            **first_contact.versions(device),
        },
        "source": check.source(),
        "shape": dataclasses.asdict(shape),
        "results": [dataclasses.asdict(each) for each in results],
        "ceilings": limits,
        "speeds": speeds,
        "doctor": facts(),
    }
    content = without_paths(content)
    if json_output:
        print(json.dumps(content))
    if report is not None:
        atomic.write(report, json.dumps(content, indent=1) + "\n")
        say(
            f"{reading.shown(report)} has all of this, versions and what doctor says; no paths, "
            "names or texts"
        )
    return 1 if wrong else 0


def _check_report(path: Path) -> None:
    """Checks, before anything is measured, that the report can be written.

    Raises:
        ConfigError: if there is something else of that name.
        OSError: if nothing can be written there.
    """
    atomic.prepare(path, ConfigError)
    if not path.exists():
        return
    try:
        found = reading.read_object(path, limit=_BYTES)
    except reading.FileError:
        found = {}
    if found.get("format") != FORMAT:
        raise ConfigError(
            f"--report {reading.shown(path)} is there and no report of kernels: choose another name"
        )


def shapes(device: Any, model: Path | None, config: str | None) -> tuple[Shape, dict[str, Served]]:
    """Returns the shape to compare, and the shapes to time, by name."""
    slow = device.platform == "cpu"
    if model is None and config is None:
        config = "7b-1m"
    with opened_or_published(model, config, ModelFlags()) as opened:
        found, (dtype, _) = opened.config, opened.precision()
    geometry = found.dual_chunk
    sizes: dict[str, Any] = {
        "num_heads": found.num_heads,
        "num_kv_heads": found.num_kv_heads,
        "head_dim": found.head_dim,
    }
    layout = EngineLayout.resolve(
        found, EngineConfig(max_len=found.max_len), platform=device.platform
    )
    shape = Shape(
        **sizes,
        page=layout.page,
        dtype=dtype,
        geometry=geometry,
        plan=layout.tiles,
    )
    served = {}
    for most in (1024,) if slow else (32_768, 1_010_000):
        context = min(most, found.max_len)
        served[f"{context:,}"] = Served(
            **sizes,
            num_layers=2,
            page=layout.page,
            geometry=geometry,
            slice_len=min(context, 256 if slow else 32_768),
            context=context,
            num_pages=-(-context // layout.page) + 1,
            num_columns=-(-context // 45),  # as the published budgets of a million tokens
        )
    return shape.soon() if slow else shape, served


def _choices(device: Any, shape: Shape, names: list[str]) -> list[dict[str, str]]:
    """Returns the backends to compare, by program."""
    about = {"kind": device.device_kind, "head_dim": shape.head_dim, "dtype": shape.dtype}
    chosen = [backend.choose(device.platform, name, **about) for name in names or [None]]
    return [{name: getattr(each, PROGRAMS[name]) for name in PROGRAMS} for each in chosen]


def _keep(shape: Shape, chosen: dict[str, str], results: list[Result], device: Any) -> None:
    """Stores the results for engines on this device, with and without sparse prefill."""
    for programs in (tuple(PROGRAMS), DENSE):
        some = {name: chosen[name] for name in programs}
        some = first_contact.unproven(some)
        if some:
            key = first_contact.key_of(shape, some, device)
            first_contact.keep(key, [each for each in results if each.program in some])


def ceilings(platform: str) -> dict[str, float | None]:
    """Measures the peak rates of matrix products and of a copy; None if out of memory."""
    n, size = (few.get(platform, many) for few, many in (_MATRIX, COPIED_BYTES))
    product = jax.jit(functools.partial(jnp.dot, precision="highest"))
    limits = {}
    for dtype in ("bfloat16", "float32"):
        seconds = _median(product, lambda dtype=dtype: [jnp.ones((n, n), dtype)] * 2)
        limits[f"{dtype} product, TFLOP/s"] = seconds and 2e-12 * n**3 / seconds
    copy = jax.jit(lambda x: x + jnp.uint32(1))
    seconds = _median(copy, lambda: [jnp.zeros(size // 4, jnp.uint32)])
    limits["copy, GB/s"] = seconds and 2e-9 * size / seconds
    return limits


def _median(run: Callable, make: Callable[[], list[jax.Array]]) -> float | None:
    """Returns the median seconds of a program on the arrays of `make`; None if out of memory."""
    try:
        return statistics.median(kernels.seconds_of(run, make(), REPEATS))
    except jax.errors.JaxRuntimeError as error:
        if not kernels.is_out_of_memory(error):
            raise
        return None


def speeds_of(
    served: dict[str, Served], names: list[str], limits: dict[str, float | None]
) -> Iterator[dict[str, Any]]:
    """Yields rows of `bench kernels`, with the bounding rate and its fraction of the peak."""
    for row in kernels.measure(served, names, REPEATS):
        row |= {"rate": None, "unit": None, "share": None}
        case, dtype = served[row["shape"]], row["dtype"]
        bound = {
            "prefill": ("TFLOP/s", f"{dtype} product, TFLOP/s", 1e-12 * flops(case)),
            "decode": ("GB/s", "copy, GB/s", 1e-9 * bytes_read(case, dtype)),
        }.get(row["program"])
        if bound is not None and row["refused"] is None:
            unit, ceiling, work = bound
            rate = work / row["median_s"]
            limit = limits[ceiling]
            row |= {"rate": rate, "unit": unit, "share": limit and rate / limit}
        yield row


def flops(case: Served) -> float:
    """Counts the FLOPs of attention over the causal pairs of the last slice of a context."""
    T = case.slice_len
    pairs = T * (case.context - T) + T * (T + 1) / 2
    return 4 * case.num_heads * case.head_dim * pairs


def bytes_read(case: Served, dtype: str) -> int:
    """Returns the bytes of keys and values that a decode step reads."""
    token = 2 * case.num_kv_heads * case.head_dim * jnp.dtype(dtype).itemsize
    return case.num_seqs * case.context * token


def without_paths(value: Any) -> Any:
    """Removes directories of this machine and names of executables from JSON."""
    if isinstance(value, dict):
        return {name: without_paths(each) for name, each in value.items() if name != "executable"}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    for known in sorted({os.path.expanduser("~"), os.getcwd(), tempfile.gettempdir(), sys.prefix}):
        if len(known) > 1:
            value = value.replace(known, "~")
    return _PATH.sub("…/", value)


def _headline(shape: Shape, device: Any) -> str:
    geometry = shape.geometry
    chunks = "one window" if geometry is None else f"chunks of {geometry.chunk_size:,}"
    return (
        f"{device.platform} ({reading.printable(device.device_kind)}): {shape.num_heads} heads, "
        f"{shape.num_kv_heads} for keys, of {shape.head_dim} in {shape.dtype}; pages of "
        f"{shape.page}; {chunks}{'' if shape.far else ', compared in smaller ones'}"
    )


def _row(*cells: str) -> str:
    widths = 16, 12, 11, 15, 15, 13, 8
    return "".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _of_result(result: Result) -> tuple[str, ...]:
    error, lse = (
        "-" if each is None else f"{each:.1e}" for each in (result.error, result.lse_error)
    )
    context = f"{result.context:,}"
    return result.program, result.backend, context, result.truth, error, lse, result.verdict


def _of_speed(row: dict[str, Any]) -> tuple[str, ...]:
    if row["refused"] is not None:
        return row["program"], row["backend"], row["shape"], row["refused"], "", "", ""
    rate, share = "-", "-"
    if row["rate"] is not None:
        rate = f"{row['rate']:,.2f} {row['unit']}"
    if row["share"] is not None:
        share = f"{row['share']:.0%}"
    milliseconds = f"{1e3 * row['median_s']:.2f}"
    return row["program"], row["backend"], row["shape"], milliseconds, rate, share, ""
