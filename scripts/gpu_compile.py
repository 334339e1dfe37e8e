"""Compilation for NVIDIA GPUs on a machine without one: programs, registers, spills.

Needs `pip install jax-cuda13-plugin jax-cuda13-pjrt` in the version of jax; for Triton kernels
jax-triton and Triton. Nothing is run, so no times are measured. The compilers read their
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
_DUMP, _CODE = "JAX_TRITON_DUMP_DIR", "code"
_MOSAIC_DUMP = "MOSAIC_GPU_DUMP_TO"
# Shared memory in the code that starts a Mosaic GPU kernel, of jax 0.10 and of jax 0.11, where it
# comes after the sizes of grid, cluster and block.
_SHARED = re.compile(
    r"call .*(?:@mosaic_gpu_get_function\(.*?, i32 (\d+), i32 1\)"
    r"|@mosaic_gpu_launch_kernel\(ptr [^,]+(?:, i32 \d+){9}, i32 (\d+),)"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Properties of a GPU for the compiler (CUDA C++ Programming Guide, table of capabilities).

    Attributes:
        name: name that its driver reports.
        products: bfloat16 multiply-adds per cycle of the tensor cores of one core (SM).
        shared_per_core: bytes of shared memory per core, of which one block may use
            `shared_per_block`.
        bandwidth: memory bandwidth in bytes/s.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    lanes_per_core: int
    products: int
    threads_per_core: int
    shared_per_core: int
    shared_per_block: int
    l2: int
    clock_ghz: float
    memory: int
    bandwidth: int

    def config(self) -> str:
        """Returns a `GpuTargetConfig` of XLA as text."""
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
        products=1024,
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
        products=512,
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
        products=2048,
        threads_per_core=2048,
        shared_per_core=228 * 1024,
        shared_per_block=227 * 1024,
        l2=50 * 2**20,
        clock_ghz=1.98,
        memory=141 * 10**9,
        bandwidth=4800 * 10**9,
    ),
    "b200": Gpu(
        name="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        lanes_per_core=128,
        products=4096,
        threads_per_core=2048,
        shared_per_core=228 * 1024,
        shared_per_block=227 * 1024,
        l2=126 * 2**20,
        clock_ghz=1.965,
        memory=180 * 10**9,
        bandwidth=8000 * 10**9,
    ),
    "rtxpro6000": Gpu(
        name="NVIDIA RTX PRO 6000 Blackwell Server Edition",
        capability=(12, 0),
        cores=188,
        lanes_per_core=128,
        products=512,
        threads_per_core=1536,
        shared_per_core=100 * 1024,
        shared_per_block=99 * 1024,
        l2=128 * 2**20,
        clock_ghz=2.43,
        memory=96 * 10**9,
        bandwidth=1597 * 10**9,
    ),
}


class Kernel(NamedTuple):
    """Resources of a kernel as ptxas reports them; spills and shared memory in bytes.

    Attributes:
        warps: warps per program; 0 if unknown.
        columns: columns of tensor memory, of which a core of Blackwell has 512.
    """

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int = 0
    columns: int = 0


def resident(gpu: Gpu, kernel: Kernel) -> int:
    """Returns the number of programs of a kernel that a core runs at a time."""
    threads = 32 * kernel.warps
    registers = -(-kernel.registers // 8) * 8 * threads
    return min(
        32,
        65536 // registers,
        gpu.threads_per_core // threads,
        gpu.shared_per_core // (kernel.shared + 1024),
        512 // max(kernel.columns, 1),
    )


def mesh(gpu: str, count: int = 1):
    """Returns a mesh of GPUs along `seq`, to lower for inside `jax.set_mesh`."""
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
    """A compiled program: its `memory_analysis()`, its text, and its kernels."""

    memory: Any
    text: str
    kernels: list[Kernel]


def compiled(mesh, function: Callable, *args, **options) -> Compiled:
    """Compiles a function for a mesh on which its arguments, arrays or shapes, are replicated.

    `options` are passed to `jax.jit`.
    """
    before = _mosaic_dumps()
    lowered, made = _lowered(mesh, function, args, options)
    done = lowered.compile()
    found = [each for each, _ in made] + list(map(_mosaic, sorted(_mosaic_dumps() - before)))
    return Compiled(done.memory_analysis(), done.as_text() or "", found)


def kernels(mesh, function: Callable, *args) -> list[tuple[Kernel, Path]]:
    """Compiles a function; returns its Triton kernels with paths of their machine code."""
    return _lowered(mesh, function, args, {})[1]


def _lowered(mesh, function: Callable, args, options) -> tuple[Any, list[tuple[Kernel, Path]]]:
    import jax

    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def described(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    before = set(Path(os.environ[_DUMP]).iterdir())
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, **options).lower(*jax.tree.map(described, args))
    new = sorted(set(Path(os.environ[_DUMP]).iterdir()) - before)
    return lowered, [(_triton(each), each / _CODE) for each in new]


def _mosaic_dumps() -> set[Path]:
    return {*Path(os.environ[_MOSAIC_DUMP]).glob("*.ptxas")}


def missing(backend: str = "triton") -> str | None:
    """Names missing packages that compilation for a backend needs; None if all are installed."""
    from pallas_kernels.dispatch.versions import mosaic_gpu_fault, triton_fault

    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return (
            "the compiler of NVIDIA GPUs is not installed: pip install jax-cuda13-plugin "
            "jax-cuda13-pjrt, in the version of jax"
        )
    return triton_fault() if backend == "triton" else mosaic_gpu_fault()


def ready() -> bool:
    """Returns True if this process was started with `ENVIRONMENT`."""
    return _DUMP in os.environ


def in_child(script: str, *arguments: str) -> Iterator[dict]:
    """Runs a script in a process in which `compiled` works; yields the JSON lines it prints."""
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
    """Reads a kernel from the folder of jax-triton's compilation output."""
    (ptx,) = folder.glob("*.ptx")
    text = ptx.read_text()
    target = re.search(r"^\.target (sm_(\d+)\w*)", text, re.MULTILINE)
    assert target is not None
    tool = "ptxas-blackwell" if int(target[2]) >= 100 else "ptxas"
    said = run_tool(tool, "-v", f"--gpu-name={target[1]}", ptx, "-o", folder / _CODE).stderr
    (info,) = folder.glob("*.compile_info")
    (shared,) = re.findall(r"shared_mem_bytes: (\d+)", info.read_text())
    (threads,) = re.findall(r"^\.reqntid (\d+)", text, re.MULTILINE)
    (ttgir,) = folder.glob("*.ttgir")
    (columns,) = re.findall(r"ttg.tensor_memory_size = (\d+)", ttgir.read_text())
    registers, spilled = _said(said)
    return Kernel(
        name=ptx.stem,
        warps=int(threads) // 32,
        registers=registers,
        spilled=spilled,
        shared=int(shared),
        columns=int(columns),
    )


def _mosaic(said: Path) -> Kernel:
    """Reads a kernel from the file in which Mosaic GPU stores ptxas's output."""
    shared = _SHARED.search(said.with_suffix(".ll").read_text())
    assert shared is not None
    name = said.stem.rsplit("_", 1)[0]
    kernel = Kernel(name, *_said(said.read_text()), int(shared[1] or shared[2]))
    for each in said.parent.glob(f"{said.stem}.mlir-passes.log"):
        each.unlink()  # tens of megabytes
    return kernel


def _said(text: str) -> tuple[int, int]:
    """Parses registers and spilled bytes from ptxas's output."""
    (registers,) = re.findall(r"Used (\d+) registers", text)
    return int(registers), sum(map(int, re.findall(r"(\d+) bytes spill", text)))


def run_tool(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a tool that comes with Triton."""
    from triton.backends import nvidia

    path = Path(nvidia.__file__).parent / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True)


def inner_loop(code: Path) -> tuple[int, int]:
    """Counts instructions, and exponentials among them, of the inner loop with most products.

    Of several loops the shortest counts: contiguous keys need fewer instructions than single ones.
    """
    listed = run_tool("cuobjdump", "-sass", code).stdout
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(?:@!?U?P\w+ +)?([^;/]+);", listed)
    place = {int(address, 16): i for i, (address, _) in enumerate(found)}
    names = [instruction.split()[0].split(".")[0] for _, instruction in found]
    made = {"HMMA", "HGMMA", "UTCHMMA"} & set(names) or {"FFMA"}
    loops: list[tuple[int, int, range]] = []
    for last, (_, instruction) in enumerate(found):
        jump = re.match(r"BRA\b.*?0x([0-9a-f]+)", instruction)
        first = place[int(jump[1], 16)] if jump else last
        products = sum(name in made for name in names[first:last])
        if products and not any(first <= body[0] for *_, body in loops):
            loops.append((products, first - last, range(first, last + 1)))
    *_, body = max(loops, key=lambda each: each[:2])
    return len(body), names[body[0] : body[-1] + 1].count("MUFU")
