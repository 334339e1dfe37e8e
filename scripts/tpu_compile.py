"""Compilation for TPUs on a machine without one: programs, their memory, their schedules.

Needs `pip install libtpu`. Nothing is run, so no times are measured.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

GENERATIONS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
"""Topology of each generation, of which one device is used."""
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
"""Environment that keeps libtpu from probing for a TPU, and lets several processes compile."""
_DUMP = "TPU_COMPILE_DUMP"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Schedule of one compiled kernel in bundles, each of which takes a cycle without stalls.

    Attributes:
        matmuls: slots of the matrix units that the bundles fill.
        slots: slots of the matrix units per bundle.
        inner: bundles and matmuls of the basic block with the most matmuls.
        spills: registers written to memory or read back.
    """

    name: str
    bundles: int
    matmuls: int
    slots: int
    inner: tuple[int, int]
    spills: int

    @property
    def mxu(self) -> float:
        """Fraction of all slots of the matrix units that are filled."""
        return self.matmuls / (self.bundles * self.slots)

    @property
    def inner_mxu(self) -> float:
        """Fraction of the slots of the inner basic block that are filled."""
        bundles, matmuls = self.inner
        return matmuls / (bundles * self.slots)


def mesh(generation: str, count: int = 1):
    """Returns a mesh of devices along `seq`, to lower for inside `jax.set_mesh`."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    name = GENERATIONS[generation]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    grid = np.array(devices[:count]).reshape(1, count, 1)
    return jax.sharding.Mesh(grid, ("data", "seq", "tensor"))


def memory_of(mesh) -> int:
    """Returns the bytes of HBM of a device of this mesh."""
    import jax
    from jax.experimental.pallas import tpu as pltpu

    with jax.set_mesh(mesh):
        info = pltpu.get_tpu_info()
    return info.hbm_capacity_bytes * info.num_cores


class Compiled(NamedTuple):
    """A compiled program: its `memory_analysis()`, and its text."""

    memory: Any
    text: str


def compiled(mesh, function: Callable, *args, **options) -> Compiled:
    """Compiles a function for a mesh on which its arguments, arrays or shapes, are replicated.

    `options` are passed to `jax.jit`.

    The text is the compiler's own, since this version of jax may be unable to parse it.
    """
    import jax

    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def described(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    with jax.set_mesh(mesh):
        lowered = jax.jit(function, **options).lower(*jax.tree.map(described, args))
    with tempfile.TemporaryDirectory() as dump:
        dumped = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        memory = lowered.compile(compiler_options=dumped).memory_analysis()
        (text,) = Path(dump).glob("*.after_optimizations.txt")
        return Compiled(memory, text.read_text())


def in_child(script: str, *arguments: str) -> Iterator[dict]:
    """Runs a script that prints JSON lines, in whose process `schedules` works.

    The compiler reads its flags once, so every generation needs a process.
    """
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        more = ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags, _DUMP: dump}
        done = subprocess.run(
            [sys.executable, script, *arguments],
            env=os.environ | more,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    yield from map(json.loads, done.stdout.splitlines())


def schedules(mesh, function: Callable, *args) -> list[Schedule]:
    """Compiles a function and reads the schedules of its Pallas kernels."""
    dump = Path(os.environ[_DUMP])
    for old in dump.iterdir():
        old.unlink()
    text = compiled(mesh, function, *args).text
    kernels = re.findall(r"%([\w.-]+) = [^\n]* custom_call_target=\"tpu_custom_call\"", text)
    return [schedule_of(dump, name) for name in dict.fromkeys(kernels)]


def schedule_of(dump: Path, name: str) -> Schedule:
    (use,) = dump.glob(f"*-{name}-*final_hlo-static-per-bundle-utilization.txt")
    (bundles,) = dump.glob(f"*-{name}-*-final_bundles.txt")
    _, names, sizes, _, *lines = use.read_text().splitlines()
    units = [unit.strip() for unit in names.split(",")]
    rows = [[int(count) for count in line.split()] for line in lines if line.strip()]
    matmul = next(i for i, unit in enumerate(units) if unit == "MATMUL" or "MXU" in unit)
    spill = [i for i, unit in enumerate(units) if "SPILL" in unit or "FILL" in unit]
    pieces = [(0, 0)]
    for row, begins in zip(rows, _begins(bundles), strict=True):
        count, matmuls = (0, 0) if begins else pieces.pop()
        pieces.append((count + 1, matmuls + row[matmul]))
    return Schedule(
        name=name,
        bundles=len(rows),
        matmuls=sum(row[matmul] for row in rows),
        slots=int(sizes.split()[matmul]),
        inner=max(pieces, key=lambda piece: piece[1]),
        spills=sum(row[i] for row in rows for i in spill),
    )


def _begins(bundles: Path) -> Iterator[bool]:
    """Yields for each bundle whether it begins a basic block."""
    jumps = False
    for line in bundles.read_text().splitlines():
        found = re.match(r" *(?:0x[0-9a-f]+|0) +(LH|LB|LE|PB|PF|CT)? *:", line)
        if found:
            yield bool(found[1]) or jumps
            jumps = "sbr.rel" in line
