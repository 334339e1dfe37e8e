"""Triton kernels in Triton's interpreter, on a CPU: in place of `triton_call.launch`."""

import inspect
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.triton import call

triton = pytest.importorskip("triton", reason="Triton (pip install triton) is not installed")
tl = pytest.importorskip("triton.language")
torch = pytest.importorskip("torch", reason="PyTorch, which Triton interprets with")
interpreter = pytest.importorskip("triton.runtime.interpreter")
assert os.environ["TRITON_INTERPRET"] == "1"  # conftest: before a kernel is imported

_ONE_AT_A_TIME = threading.Lock()  # the interpreter replaces functions of Triton while it runs


@pytest.fixture
def interpreted(monkeypatch):
    """Triton kernels run here."""
    interpret(monkeypatch)


def interpret(patch: pytest.MonkeyPatch):
    """Run Triton kernels here; what they do not write is NaN or the lowest integer."""
    patch.setattr(call, "launch", launch)
    patch.setattr(call, "capability", lambda: 90)
    patch.setattr(interpreter, "interpreter_builder", _Builder())
    patch.setattr(interpreter, "_convert_float", _convert_float)
    patch.setattr(interpreter, "_patch_lang_tensor", _patch_lang_tensor)
    patch.setattr(interpreter, "_patch_lang", _patch_lang)


# Triton 3.6 multiplies bfloat16 as the 16-bit integers in which it keeps it, and rounds to it
# toward zero. Bounds of loops are arrays of one number, which numpy 2.4 makes no integer of.
class _Builder(interpreter.InterpreterBuilder):
    def create_dot(self, a, b, d, *options):
        wide = [self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)]
        return super().create_dot(*wide, d, *options)


def _convert_float(data, source, target, rounding_mode, *, convert=interpreter._convert_float):
    if (source, target) == (tl.float32, tl.bfloat16):
        return data.astype(jnp.bfloat16).view(np.uint16)
    if (source, target) == (tl.bfloat16, tl.float32):
        return data.view(jnp.bfloat16).astype(np.float32)
    return convert(data, source, target, rounding_mode)


def _patch_lang_tensor(tensor, scope, *, patch=interpreter._patch_lang_tensor):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


_replaced = set()  # modules whose functions are Triton's replacements, in this launch


def _patch_lang(fn, *, patch=interpreter._patch_lang):
    """Replaces functions once a launch, not on every call of a function within a kernel."""
    modules = frozenset(
        id(each)
        for each in fn.__globals__.values()
        if inspect.ismodule(each) and each in (tl, tl.core)
    )
    if modules in _replaced:
        return interpreter._LangPatchScope()
    _replaced.add(modules)
    return patch(fn)


def launch(kernel, *args, outputs, grid, num_warps, num_stages, **constants):
    """Launches a kernel like `triton.call.launch`."""
    del num_warps, num_stages

    def run(*arrays):
        with _ONE_AT_A_TIME:
            return run_alone(*arrays)

    def run_alone(*arrays):
        results = [_tensor(_unwritten(each)) for each in outputs]
        _replaced.clear()
        kernel[grid](*map(_tensor, arrays), *results, **constants)
        return [_array(each, of.dtype) for each, of in zip(results, outputs, strict=True)]

    if any(isinstance(each, jax.core.Tracer) for each in args):
        return jax.pure_callback(run, list(outputs), *args, vmap_method="sequential")
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
