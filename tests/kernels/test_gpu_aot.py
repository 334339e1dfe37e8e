"""Every kernel for NVIDIA GPUs, and the engine's steps with them, compiled without a GPU.

A million tokens of 7B whole, and of 14B the share of one of four GPUs. The default suite compiles
the kernels for one GPU; the rest takes minutes: `make test-gpu-aot`.
"""

import functools

import gpu_compile
import gpu_facts
import pytest

from pallas_kernels.programs import PROGRAMS
from qwen_jax.planner.shapes import MODELS
from qwen_jax.sparse import budgets

MISSING = gpu_compile.missing()
needs_triton = pytest.mark.skipif(bool(MISSING), reason=MISSING or "")
MOSAIC_MISSING = gpu_compile.missing("mosaic_gpu")
needs_mosaic_gpu = pytest.mark.skipif(bool(MOSAIC_MISSING), reason=MOSAIC_MISSING or "")
MOSAIC_PROGRAMS = "prefill", "sparse prefill", "decode", "selection"

SOON = {("h200", "7B")}
PAIRS = [
    pytest.param(gpu, model, marks=() if (gpu, model) in SOON else pytest.mark.gpu_aot)
    for gpu in gpu_compile.GPUS
    for model in MODELS
]


FLOATS = [pytest.param(gpu, marks=pytest.mark.gpu_aot) for gpu in gpu_compile.GPUS]


@functools.cache
def facts(*arguments):
    return {row["program"]: row for row in gpu_compile.in_child(gpu_facts.__file__, *arguments)}


@needs_triton
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(("gpu", "model"), PAIRS)
def test_a_kernel_keeps_its_registers_and_reads_the_cache_where_it_lies(gpu, model, name):
    row = facts("--json", "--gpus", gpu, "--models", model, "--backends", "triton")[name]
    assert row["kernels"]
    for kernel in row["kernels"]:
        print(gpu, model, name, kernel)
        assert kernel["spilled"] == 0
        assert kernel["shared"] <= gpu_compile.GPUS[gpu].shared_per_block
    assert row["temporaries"] <= bound(name, model)
    assert not row["copies_cache"]


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("gpu", FLOATS)
def test_a_kernel_keeps_its_registers_in_float32_too(gpu, name):
    for kernel in facts("--json", "--gpus", gpu, "--models", "7B", "--dtype", "float32")[name][
        "kernels"
    ]:
        print(gpu, name, kernel)
        assert kernel["spilled"] == 0
        assert kernel["shared"] <= gpu_compile.GPUS[gpu].shared_per_block


def bound(name, model):
    """Bytes that a program may hold beside its arguments and results."""
    case = MODELS[model].served(gpu_facts.CONTEXT, tensor=gpu_facts.TENSOR[model])
    if name == "prefill":
        return 2**20
    if name == "sparse prefill":  # lists of blocks and columns of its programs
        blocks = case.context // budgets.tiles_on("gpu").k + 32
        return 4 * 1024 * (blocks + case.num_columns) + 2**24
    return 2**23 if name == "selection" else 2**22


@needs_mosaic_gpu
@pytest.mark.parametrize("name", MOSAIC_PROGRAMS)
@pytest.mark.parametrize("model", ["7B", pytest.param("14B", marks=pytest.mark.gpu_aot)])
def test_a_kernel_for_hopper_keeps_its_registers_and_reads_the_cache_where_it_lies(model, name):
    gpu = gpu_facts.HOPPER
    row = facts("--json", "--gpus", gpu, "--models", model, "--backends", "mosaic_gpu")[name]
    # What three warpgroups of 128 threads may have of 65,536 before they share them out anew, and
    # two blocks of one.
    most = 255 if name == "selection" else 168
    assert row["kernels"]
    for kernel in row["kernels"]:
        print(gpu, model, name, kernel)
        assert kernel["spilled"] == 0
        assert kernel["registers"] <= most
        assert kernel["shared"] <= gpu_compile.GPUS[gpu].shared_per_block
    case = MODELS[model].served(gpu_facts.CONTEXT, tensor=gpu_facts.TENSOR[model])
    packed = 2 * 2 * case.num_heads * case.num_columns * case.head_dim if "sparse" in name else 0
    assert row["temporaries"] <= 1.1 * packed + 2**24
    assert not row["copies_cache"]


# What one H200 may hold; the rest is for what is there beside a program.
PEAK = 120 * 2**30


@pytest.mark.gpu_aot
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("triton", marks=needs_triton),
        pytest.param("mosaic_gpu", marks=needs_mosaic_gpu),
    ],
)
@pytest.mark.parametrize(("name", "calls"), [("prefill", 1), ("prefill_sparse", 5), ("decode", 2)])
def test_a_step_over_a_million_tokens_fits_and_never_copies_the_cache(name, calls, backend):
    row = facts("--json", "--gpus", "h200", "--models", "", "--backends", backend, "--steps")[
        f"step: {name}"
    ]
    assert row["calls"] >= calls
    assert row["peak"] < PEAK
    assert row["overwritten"] >= row["cache_bytes"]
    assert row["temporaries"] < 0.1 * row["cache_bytes"]
    assert not row["copies_cache"]
