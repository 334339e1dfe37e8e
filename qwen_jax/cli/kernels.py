"""bench kernels: speed of the attention kernels on this device."""

import json as json_format
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.table import Table

from pallas_kernels.cases import Served
from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.programs import PROGRAMS, inputs, program
from qwen_jax.cli import placement
from qwen_jax.cli.console import console
from qwen_jax.cli.flags import Json, option
from qwen_jax.config import ConfigError
from qwen_jax.llm.options import Within
from qwen_jax.planner import devices
from qwen_jax.planner.shapes import SERVED

FULL = "out of memory: end what else uses the device, or take a smaller shape"
_SOON = {"cpu": "small at 2k"}
_USUAL = "7B at 32k,7B at 1M"


def kernels(
    shapes: Annotated[str | None, option(f"Of {', '.join(SERVED)}; what suits the device.")] = None,
    backends: Annotated[
        str | None, option("Of those that run here; all but the reference.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts."), Within(1)] = 5,
    json: Json = False,
):
    """Time prefill, sparse prefill, decode and selection on random values.

    One layer's attention of one device, without the rest of the model. Each program runs
    once before it is timed. Also says which kernels each kind of device would run.

    Examples:
        qwen-jax bench kernels
        qwen-jax bench kernels --shapes "7B at 256k" --backends mosaic_tpu,xla --json
    """
    placement.one_process("kernels are timed")
    devices.found()
    here = backend.device()
    names = (shapes or _SOON.get(here.platform, _USUAL)).split(",")
    for name in names:
        if name not in SERVED:
            raise ConfigError(f"there is no shape {name!r}; there are {', '.join(SERVED)}")
    chosen = [each for each in backend.on(here.platform) if each != "reference"]
    if backends is not None:
        chosen = backends.split(",")
        for each in chosen:
            backend.choose(here.platform, each)
    preferences = {kind: each._asdict() for kind, each in backend.preferences().items()}
    rows = []
    table = Table("shape", "program", "backend", "ms (median)")
    for row in measure({name: SERVED[name] for name in names}, chosen, repeats):
        rows.append(row)
        result = row["refused"] or f"{1e3 * row['median_s']:.2f}"
        table.add_row(row["shape"], row["program"], row["backend"], result)
    if json:
        print(json_format.dumps({"device": here._asdict(), "rows": rows, "kernels": preferences}))
        return
    print(f"{here.platform} ({here.kind}); {backend.choose(here.platform)}")
    console().print(table)
    console().print(table_of(preferences))


def measure(
    cases: Mapping[str, Served], backends: list[str], repeats: int
) -> Iterator[dict[str, Any]]:
    """Times every program at every shape; yields rows, with the reason if a backend refuses."""
    dtype = jnp.float32 if backend.device().platform == "cpu" else jnp.bfloat16
    for name, case in cases.items():
        for what in PROGRAMS:
            args = None
            for each in backends:
                row = {"shape": name, "program": what, "backend": each, "refused": None}
                row["dtype"] = jnp.dtype(dtype).name
                try:
                    if args is None:  # from inside a program, so that no more is made than needed
                        args = jax.jit(lambda what=what, case=case: inputs(what, case, dtype))()
                    row["seconds"] = time_of(what, case, each, args, repeats)
                    row["median_s"] = statistics.median(row["seconds"])
                except (Unsupported, jax.errors.JaxRuntimeError) as error:
                    full = is_out_of_memory(error)
                    row["refused"] = FULL if full else str(error).splitlines()[0]
                yield row


def is_out_of_memory(error: Exception) -> bool:
    """Returns True if an error of XLA says that a device is out of memory."""
    return any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "Out of memory"))


def time_of(what: str, case: Served, name: str, args, repeats: int, **keywords: Any) -> list[float]:
    """Times runs of a compiled program, in seconds; keywords are passed to the backend."""
    options = backend.compiler_options(backend.device().platform)
    run = jax.jit(program(what, case, name, **keywords), compiler_options=options)
    return seconds_of(run, args, repeats)


def seconds_of(run: Callable, args, repeats: int) -> list[float]:
    """Times `repeats` runs of a compiled function, in seconds, after a first one."""
    jax.block_until_ready(run(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        seconds.append(time.perf_counter() - start)
    return seconds


def table_of(preferences: dict[str, dict[str, str]]) -> Table:
    """Builds the table of preferred backends, device kinds by operations."""
    table = Table("device", *backend.Backends._fields)
    for kind, row in preferences.items():
        table.add_row(kind, *row.values())
    return table
