"""The whole model with Triton kernels, interpreted, inside jit, scan and shard_map."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support import triton_interpreter
from support.children import run
from support.mesh_logits import CONFIG, PART, budgets, logits

from pallas_kernels.dispatch import backend
from pallas_kernels.triton import call
from qwen_jax.distributed import sharding


@pytest.mark.parametrize(
    ("devices", "sparse"), [(1, False), pytest.param(2, True, marks=pytest.mark.long)]
)
def test_logits_by_triton_are_those_of_xla(devices, sparse):
    run(compare, devices, sparse)


def compare(devices, sparse):
    jax.config.update("jax_num_cpu_devices", devices)
    sizes = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    config = dataclasses.replace(CONFIG, **sizes)
    compute = functools.partial(
        logits,
        sharding.MeshShape(seq=devices),
        PART * devices,
        budgets(config) if sparse else None,
        config=config,
        prompts=(103, 20),
        answer=1,
    )
    expected = compute()
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
        found = compute()
    assert len(launched) >= (5 if sparse else 2)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
