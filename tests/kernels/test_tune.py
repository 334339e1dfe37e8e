"""The search for sizes: what candidates are worth, which one is taken, what the tables hold."""

import dataclasses
import inspect
import json
import sys
import types

import gpu_compile
import jax
import jax.numpy as jnp
import pytest
import tune_gpu
import tune_kernels
import tune_tpu
from bench_gpu_truth import WrongError

from pallas_kernels.dispatch import backend, tiles
from pallas_kernels.dispatch.backend import Device
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.programs import PROGRAMS, inputs, program
from pallas_kernels.triton import call
from qwen_jax.planner.shapes import SERVED

pytestmark = pytest.mark.optimized


def tried(program, sizes, worth, close=0.98):
    return {"program": program, "sizes": sizes, "worth": worth, "says": "", "close": close}


def test_tuning_takes_the_last_of_those_that_are_about_as_good(monkeypatch, tmp_path, capsys):
    found = [
        tried("prefill", {"tiles": {"q": 1, "k": 1}}, 0.80),
        tried("prefill", {"tiles": {"q": 2, "k": 1}}, 0.79),
        tried("prefill", {"tiles": {"q": 4, "k": 1}}, 0.70),
        tried("prefill", {"tiles": {"q": 8, "k": 1}}, None),
        tried("sparse prefill", {"step": 512}, 0.5),
    ]
    monkeypatch.setattr(tune_tpu, "in_child", lambda *_: found)
    out = tmp_path / "mosaic_tpu.json"
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", "--devices", "v6e", "--out", str(out)])
    tune_kernels.main()
    table = json.loads(out.read_text())
    assert table["v6e"]["prefill"] == {"tiles": {"q": 2, "k": 1}}
    assert table["v6e"]["sparse prefill"] == {"step": 512}
    assert "TPU v6 lite" in table["v6e"]["device_kinds"]
    assert "takes {'step': 512}" in capsys.readouterr().out


def test_times_take_the_fastest_alone_and_need_a_device(monkeypatch, tmp_path):
    row = {}
    tune_kernels.take(row, "x", [tried("decode", {"a": 1}, 5.0, 1.0), tried("decode", {}, 4.9, 1)])
    assert row == {"decode": {"a": 1}}
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", "--time", "--out", str(tmp_path / "t")])
    with pytest.raises(SystemExit, match="--time needs a TPU or GPU; this is a cpu"):
        tune_kernels.main()


@pytest.mark.parametrize("search", tune_kernels.BACKENDS.values())
def test_every_program_has_candidates(search):
    assert set(search.CANDIDATES) == set(PROGRAMS)
    assert set(search.PROGRAMS) <= set(PROGRAMS)


CASE = dataclasses.replace(
    SERVED["small at 2k"],
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    page=16,
    geometry=ChunkGeometry(chunk_size=48, local_size=16),
    slice_len=32,
    context=100,
    num_pages=8,
)


@pytest.mark.parametrize("what", PROGRAMS)
def test_only_what_agrees_with_float64_is_timed(what):
    args = inputs(what, CASE, jnp.float32, Tiles(q=16, k=8))
    found = program(what, CASE, "xla")(*args)
    tune_kernels.check(what, CASE, args, found)
    wrong = jax.tree.map(lambda x: x + 1e-2, found)
    with pytest.raises(WrongError):
        tune_kernels.check(what, CASE, args, wrong)


def kernel(**changes):
    sizes = {"warps": 4, "registers": 168, "spilled": 0, "shared": 50_000, "columns": 0}
    return gpu_compile.Kernel(name="k", **sizes | changes)


@pytest.mark.parametrize(
    ("gpu", "changes", "programs"),
    [
        ("h200", {}, 3),  # of registers: 65,536 over 128 x 168
        ("h200", {"registers": 161}, 3),
        ("a100", {"registers": 32, "shared": 0}, 16),  # of threads
        ("l40s", {"shared": 49 * 1024}, 2),  # of shared memory, and 1 KiB of each program
        ("l40s", {"shared": 49 * 1024 + 1}, 1),
        ("b200", {"columns": 256, "registers": 64, "shared": 0}, 2),  # of tensor memory
    ],
)
def test_a_core_runs_as_many_programs_as_it_has_room_for(gpu, changes, programs):
    assert gpu_compile.resident(gpu_compile.GPUS[gpu], kernel(**changes)) == programs


CODE = """
        /*0000*/               MOV R1, c[0x0][0x28] ;   /* 0x00000a00ff017624 */
        /*0010*/               HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/               MUFU.EX2 R4, R4 ;
        /*0030*/               HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/               HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/          @!P1 BRA 0x10 ;
        /*0060*/               HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/           @P2 BRA 0x60 ;
        /*0080*/               FFMA R4, R4, R4, R4 ;
        /*0090*/           @P3 BRA 0x0 ;
        /*00a0*/               BRA 0xa0;
"""


def test_the_inner_loop_with_most_products_is_found(monkeypatch):
    output = types.SimpleNamespace(stdout=CODE)
    monkeypatch.setattr(gpu_compile, "run_tool", lambda *_: output)
    assert gpu_compile.inner_loop(None) == (5, 1)


def test_tensor_cores_share_a_core_with_instructions_and_wait_where_nothing_else_runs():
    gpu = gpu_compile.GPUS["a100"]  # 1,024 products a cycle
    step = tune_gpu.Step(rows=64, keys=64, products=2)  # of 1,024 cycles
    one = kernel(registers=255, shared=100_000)
    assert gpu_compile.resident(gpu, one) == 1
    assert tune_gpu.share(gpu, one, (512, 0), step) == 1024 / (1024 + 512)
    wide = one._replace(warps=8)
    assert tune_gpu.share(gpu, wide, (256, 0), step) == 1
    assert tune_gpu.share(gpu, wide, (1024, 0), step) == 1024 / 2048
    assert tune_gpu.share(gpu, wide, (0, 128), step) == 1024 / 2048
    assert tune_gpu.share(gpu, wide._replace(columns=512), (256, 0), step) == 1024 / (1024 + 512)


def test_what_spills_or_does_not_fit_is_worth_nothing():
    gpu, sizes = gpu_compile.GPUS["l40s"], {"tile": 64, "num_stages": 2}
    streams = kernel(shared=40_000)._replace(name="_attend")
    # Two programs have a tile of 32 KiB on its way each; memory delivers 12 KB in 2 us to a core.
    assert tune_gpu.worth(gpu, "decode", [(streams, None)], sizes) == 1
    for changes in {"spilled": 8}, {"shared": 99 * 1024 + 1}:
        made = [(streams, None), (kernel(**changes), None)]
        assert tune_gpu.worth(gpu, "decode", made, sizes) is None
    few = {"tile": 16, "num_stages": 2}
    gpu = gpu_compile.GPUS["b200"]
    on_way = gpu_compile.resident(gpu, streams) * 2 * 2 * 16 * 128
    wanted = tune_gpu.AHEAD * gpu.bandwidth / gpu.cores
    assert tune_gpu.worth(gpu, "decode", [(streams, None)], few) == pytest.approx(on_way / wanted)


@pytest.mark.parametrize("name", gpu_compile.GPUS)
def test_the_table_has_sizes_for_every_gpu_that_is_compiled_for(name, monkeypatch):
    gpu = gpu_compile.GPUS[name]
    row = json.loads((tiles.PACKAGED / "triton.json").read_text())[name]
    assert gpu.name in row["device_kinds"]
    monkeypatch.setattr(jax, "devices", list)
    for kind in row["device_kinds"]:
        monkeypatch.setattr(backend, "device", lambda kind=kind: Device("gpu", kind))
        major, minor = gpu.capability
        assert call.capability() == 10 * major + minor
    for what, operation in PROGRAMS.items():
        found = tiles.tuned(
            "triton", tune_kernels.tabled(what), gpu.name, "bfloat16", tune_gpu.HEAD_DIM
        )
        assert set(found) >= set(tune_gpu.CANDIDATES[what])
        pytest.importorskip("triton")
        taken = inspect.signature(
            getattr(backend.load(operation, "triton"), backend.FUNCTIONS[operation])
        )
        assert set(found) <= set(taken.parameters)
    assert tiles.tuned("triton", "prefill", gpu.name, "float32", tune_gpu.HEAD_DIM) == {}
    assert tiles.tuned("triton", "prefill", gpu.name, "bfloat16", 64) == {}
