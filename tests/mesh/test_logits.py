"""Logits do not depend on the mesh: prefill in slices, dense and sparse, and decode."""

import jax
import numpy as np
import pytest
from support.children import run
from support.mesh_logits import PART, budgets, logits

from qwen_jax.distributed import sharding


def test_logits_do_not_depend_on_the_mesh():
    run(compare, "seq=2,tensor=4")


@pytest.mark.long
@pytest.mark.parametrize(
    "mesh", ["seq=8", "tensor=8", "seq=4,tensor=2", "seq=3,tensor=2", "seq=5", "seq=7"]
)
def test_logits_do_not_depend_on_any_mesh(mesh):
    run(compare, mesh)


def compare(text):
    jax.config.update("jax_num_cpu_devices", 8)
    shape = sharding.parse(text)
    for given in None, budgets():
        expected = logits(sharding.MeshShape(), PART, given)
        found = logits(shape, PART * shape.seq, given)
        assert all(np.isfinite(each).all() for each in expected)
        for a, b in zip(found, expected, strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), (text, given)
