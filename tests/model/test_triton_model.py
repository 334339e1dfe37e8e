"""The whole model with Triton kernels, interpreted, inside jit, scan and shard_map."""

import dataclasses

import jax
import numpy as np
import pytest
import test_logits
from support import triton_interpreter
from support.children import run

from pallas_kernels.dispatch import backend
from pallas_kernels.triton import call
from qwen_jax.distributed import sharding


@pytest.mark.parametrize(
    ("devices", "sparse"), [(1, False), pytest.param(2, True, marks=pytest.mark.long)]
)
def test_logits_by_triton_are_those_of_xla(devices, sparse):
    run("test_triton_model", "compare", devices, sparse)


def compare(devices, sparse):
    jax.config.update("jax_num_cpu_devices", devices)
    sizes = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    test_logits.CONFIG = dataclasses.replace(test_logits.CONFIG, **sizes)
    test_logits.PROMPTS = 103, 20
    test_logits.ANSWER = 1
    shape, budgets = sharding.MeshShape(seq=devices), test_logits._budgets() if sparse else None
    args = shape, test_logits.PART * devices, budgets
    expected = test_logits.logits(*args)
    launched = []

    def launch(kernel, *args, **keywords):
        launched.append(kernel)
        return triton_interpreter.launch(kernel, *args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        triton_interpreter.interpret(patch)
        patch.setattr(call, "launch", launch)
        patch.setitem(backend.RUNS_ON, "triton", ("cpu",))
        patch.setitem(backend.PREFERRED, "cpu", ("triton",))
        patch.setattr(backend, "triton_fault", lambda: None)
        found = test_logits.logits(*args)
    assert len(launched) >= (5 if sparse else 2)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
