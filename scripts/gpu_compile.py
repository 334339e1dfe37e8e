"""The compilers of NVIDIA GPUs, on a machine without a GPU: programs, registers, spills.

Needs `pip install jax-cuda13-plugin jax-cuda13-pjrt` in the version of jax; for Triton kernels
jax-triton and Triton. Nothing is run, so nothing here is a time. The compilers look for their
settings once, so this works in a process started with `ENVIRONMENT` (`in_child`).
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TRITON_INTERPRET": "0",
    "MOSAIC_GPU_DUMP_HOST_LLVM": "1",  # says how much shared memory a kernel takes
}
_DUMP = "JAX_TRITON_DUMP_DIR"
_MOSAIC_DUMP = "MOSAIC_GPU_DUMP_TO"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What the compiler must know of a GPU (CUDA C++ Programming Guide, table of capabilities).

    Attributes:
        name: as its driver says it.
        shared_per_core: bytes; `shared_per_block` of these a block may take.
        bandwidth: bytes/s of its memory.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    lanes_per_core: int
    threads_per_core: int
    shared_per_core: int
    shared_per_block: int
    l2: int
    clock_ghz: float
    memory: int
    bandwidth: int

    def config(self) -> str:
        """A `GpuTargetConfig` of XLA, as text."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_per_core}
  threads_per_core_limit: {self.threads_per_core}
  core_count: {self.cores}
  fpus_per_core: {self.lanes_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared_per_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{self.name}"
"""


GPUS = {
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        lanes_per_core=64,
        threads_per_core=2048,
        shared_per_core=164 * 1024,
        shared_per_block=163 * 1024,
        l2=40 * 2**20,
        clock_ghz=1.41,
        memory=80 * 10**9,
        bandwidth=2039 * 10**9,
    ),
    "l40s": Gpu(
        name="NVIDIA L40S",
        capability=(8, 9),
        cores=142,
        lanes_per_core=128,
        threads_per_core=1536,
        shared_per_core=100 * 1024,
        shared_per_block=99 * 1024,
        l2=96 * 2**20,
        clock_ghz=2.52,
        memory=48 * 10**9,
        bandwidth=864 * 10**9,
    ),
    "h200": Gpu(
        name="NVIDIA H200",
        capability=(9, 0),
        cores=132,
        lanes_per_core=128,
        threads_per_core=2048,
        shared_per_core=228 * 1024,
        shared_per_block=227 * 1024,
        l2=50 * 2**20,
        clock_ghz=1.98,
        memory=141 * 10**9,
        bandwidth=4800 * 10**9,
    ),
}


class Kernel(NamedTuple):
    """What ptxas says of a kernel; spills and shared memory in bytes."""

    name: str
    registers: int
    spilled: int
    shared: int


def mesh(gpu: str, count: int = 1):
    """GPUs along `seq`, to lower for inside `jax.set_mesh`."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(
        platform="cuda",
        topology_name=gpu,
        topology=f"1x{count}x1",
        target_config=GPUS[gpu].config(),
    ).devices
    grid = np.array(devices[:count]).reshape(1, count, 1)
    return jax.sharding.Mesh(grid, ("data", "seq", "tensor"))


class Compiled(NamedTuple):
    """What the compiler made: `memory_analysis()`, its text, and the kernels in it."""

    memory: Any
    text: str
    kernels: list[Kernel]


def compiled(mesh, function: Callable, *args, **options) -> Compiled:
    """A function compiled for a mesh, all devices of which get the same arrays, or their shapes.

    `options` go to jit.
    """
    import jax

    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def described(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def dumped():
        found = {*Path(os.environ[_DUMP]).iterdir()}
        return found | {*Path(os.environ[_MOSAIC_DUMP]).glob("*.ptxas")}

    before = dumped()
    with jax.set_mesh(mesh):
        done = jax.jit(function, **options).lower(*jax.tree.map(described, args)).compile()
    new = sorted(dumped() - before)
    kernels = [_triton(each) if each.is_dir() else _mosaic(each) for each in new]
    return Compiled(done.memory_analysis(), done.as_text() or "", kernels)


def missing(backend: str = "triton") -> str | None:
    """Which packages programs of a backend cannot be compiled without; None if all are there."""
    from pallas_kernels.versions import mosaic_gpu_fault, triton_fault

    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return (
            "the compiler of NVIDIA GPUs is not installed: pip install jax-cuda13-plugin "
            "jax-cuda13-pjrt, in the version of jax"
        )
    return triton_fault() if backend == "triton" else mosaic_gpu_fault()


def ready() -> bool:
    """Whether this process was started so that programs can be compiled in it."""
    return _DUMP in os.environ


def in_child(script: str, *arguments: str) -> Iterator[dict]:
    """The JSON lines that a script prints, in whose process `compiled` works."""
    with tempfile.TemporaryDirectory() as dump, tempfile.TemporaryDirectory() as mosaic_dump:
        with subprocess.Popen(
            [sys.executable, script, *arguments],
            env=os.environ | ENVIRONMENT | {_DUMP: dump, _MOSAIC_DUMP: mosaic_dump},
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            yield from map(json.loads, child.stdout)
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, script)


def _triton(folder: Path) -> Kernel:
    """Of a folder in which jax-triton has left what it made of a kernel."""
    from triton.backends import nvidia

    (ptx,) = folder.glob("*.ptx")
    text = ptx.read_text()
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    assert target is not None
    tool = Path(nvidia.__file__).parent / "bin" / "ptxas"
    said = subprocess.run(
        [tool, "-v", f"--gpu-name={target[1]}", ptx, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    (info,) = folder.glob("*.compile_info")
    (shared,) = re.findall(r"shared_mem_bytes: (\d+)", info.read_text())
    return Kernel(ptx.stem, *_said(said), int(shared))


def _mosaic(said: Path) -> Kernel:
    """Of the file in which Mosaic GPU has left what ptxas says of a kernel, among others."""
    (shared,) = re.findall(
        r"@mosaic_gpu_get_function\(.*?, i32 (\d+), i32 1\)", said.with_suffix(".ll").read_text()
    )
    name = said.stem.rsplit("_", 1)[0]
    kernel = Kernel(name, *_said(said.read_text()), int(shared))
    for each in said.parent.glob(f"{said.stem}.mlir-passes.log"):
        each.unlink()  # tens of megabytes
    return kernel


def _said(text: str) -> tuple[int, int]:
    """Registers and bytes spilled."""
    (registers,) = re.findall(r"Used (\d+) registers", text)
    return int(registers), sum(map(int, re.findall(r"(\d+) bytes spill", text)))
