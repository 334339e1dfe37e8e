"""The comparison of real kernels, by the interpreters of their devices."""

import functools

import pytest
from support.broken_kernels import install
from support.mosaic_gpu_interpreter import INTERPRET as MOSAIC_GPU
from support.mosaic_gpu_interpreter import interpreted  # noqa: F401
from support.mosaic_tpu_interpreter import INTERPRET

from pallas_kernels import check
from pallas_kernels.check import Shape
from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry

pytestmark = pytest.mark.long
USUAL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "far": False}


def on_a_cpu(monkeypatch, name, options):
    """The kernels of a backend, as one that runs on CPUs."""
    functions = {
        operation: functools.partial(
            getattr(backend.load(operation, name), function), **options.get(operation, {})
        )
        for operation, function in backend.FUNCTIONS.items()
    }
    return install(monkeypatch, **functions)


def all_agree(shape, name):
    for each in check.check(shape, name):
        print(each, each.error, each.lse_error)
        assert each.verdict == "agrees", each
        assert each.error <= each.limit / 2, each
        assert (each.lse_error or 0) <= each.limit / 2, each


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_of_tpus_agree(dtype, parts, monkeypatch):
    options = {
        "prefill": {"interpret": INTERPRET, "tiles": Tiles(256, 128), "step": 128},
        "decode": {"interpret": INTERPRET, "block_bytes": 2**13},
        "select": {"interpret": INTERPRET, "tile": 128},
    }
    shape = Shape(
        **USUAL,
        page=128 * parts,
        parts=parts,
        dtype=dtype,
        geometry=ChunkGeometry(700, 60),
        plan=Tiles(128, 64),
        rows=150,
    )
    all_agree(shape, on_a_cpu(monkeypatch, "mosaic_tpu", options))


@pytest.mark.parametrize("geometry", [None, ChunkGeometry(120, 20)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_of_triton_agree(dtype, geometry, monkeypatch):
    pytest.importorskip("triton", reason="Triton (pip install triton) is not installed")
    from support import triton_interpreter

    triton_interpreter.interpret(monkeypatch)
    shape = Shape(**USUAL, page=32, dtype=dtype, geometry=geometry, plan=Tiles(32, 16), rows=50)
    all_agree(shape, on_a_cpu(monkeypatch, "triton", {}))


@pytest.mark.usefixtures("interpreted")
def test_the_kernels_of_hopper_agree(monkeypatch):
    options = {
        "prefill": {"interpret": MOSAIC_GPU, "blocks": 2},
        "decode": {"interpret": MOSAIC_GPU, "blocks": 2},
        "select": {"interpret": MOSAIC_GPU},
    }
    shape = Shape(
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        page=128,
        dtype="bfloat16",
        geometry=ChunkGeometry(300, 60),
        plan=Tiles(64, 64),
        rows=100,
        far=False,
    )
    all_agree(shape, on_a_cpu(monkeypatch, "mosaic_gpu", options))
