"""JAX settings of a process or its environment change no number of an engine."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from support import settings_child

SETTINGS = {
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_DISABLE_JIT": "1",
    "JAX_DEBUG_NANS": "1",
    "JAX_CHECK_TRACER_LEAKS": "1",
    "JAX_LOG_COMPILES": "1",
}


def test_settings_around_an_engine_change_nothing():
    expected = settings_child.few_numbers("reference")
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.transfer_guard("disallow"),
        jax.disable_jit(),
    ):
        assert settings_child.few_numbers("reference") == expected


@pytest.mark.long
@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_process_change_nothing(name, backend):
    assert printed(backend, **{name: SETTINGS[name]}) == printed(backend)


def printed(backend, **settings):
    script = Path(settings_child.__file__)
    done = subprocess.run(
        [sys.executable, str(script), backend],
        env=os.environ | settings | {"PYTHONPATH": str(script.parents[1])},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout
