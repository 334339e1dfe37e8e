"""Weights are loaded alike under whatever settings of jax a process has."""

import jax
import numpy as np
import pytest
from support.checkpoints import Tiny

from convert import weights


@pytest.mark.parametrize("converted", [False, True])
def test_settings_around_a_load_change_nothing(converted, tmp_path):
    Tiny(layers=1).write(tmp_path / "hf")
    if converted:
        weights.convert(tmp_path / "hf", tmp_path / "ours")
    directory = tmp_path / ("ours" if converted else "hf")
    expected = jax.tree.map(np.asarray, weights.load(directory))
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.transfer_guard("disallow_explicit"),
        jax.disable_jit(),
    ):
        found = weights.load(directory)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), found, expected)
    )
