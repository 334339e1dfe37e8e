"""Triton kernels in Triton's interpreter, on a CPU: in place of `triton_call.launch`."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_call

triton = pytest.importorskip("triton", reason="Triton (pip install triton) is not installed")
torch = pytest.importorskip("torch", reason="PyTorch, which Triton interprets with")
assert os.environ["TRITON_INTERPRET"] == "1"  # conftest: before a kernel is imported


@pytest.fixture
def interpreted(monkeypatch):
    """Triton kernels run here; what they do not write is NaN or the lowest integer."""
    monkeypatch.setattr(triton_call, "launch", launch)
    monkeypatch.setattr(triton_call, "capability", lambda: 90)


def launch(kernel, *args, outputs, grid, num_warps, num_stages, **constants):
    """As `triton_call.launch`."""
    del num_warps, num_stages

    def run(*arrays):
        results = [_tensor(_unwritten(each)) for each in outputs]
        kernel[grid](*map(_tensor, arrays), *results, **constants)
        return [_array(each, of.dtype) for each, of in zip(results, outputs, strict=True)]

    if any(isinstance(each, jax.core.Tracer) for each in args):
        return jax.pure_callback(run, list(outputs), *args)
    return list(map(jnp.asarray, run(*args)))


def _unwritten(described):
    if jnp.issubdtype(described.dtype, jnp.floating):
        return np.full(described.shape, np.nan, described.dtype)
    return np.full(described.shape, np.iinfo(described.dtype).min, described.dtype)


def _tensor(array):
    array = np.array(array)  # a copy, which a kernel may overwrite
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor, dtype):
    if dtype == jnp.bfloat16:
        return tensor.view(torch.int16).numpy().view(dtype)
    return tensor.numpy()
