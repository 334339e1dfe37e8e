"""Largest error over the largest expected magnitude, per dtype: measured, then doubled."""

import jax.numpy as jnp
import numpy as np

LIMIT = {"float32": 2e-6, "bfloat16": 1.2e-2}


def assert_close(actual, expected, limit=None):
    limit = LIMIT[jnp.dtype(actual.dtype).name] if limit is None else limit
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= limit, f"relative error {error:.1e} exceeds {limit:.1e}"
