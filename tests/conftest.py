"""Settings that every test shares; set before jax is imported anywhere."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

for folder in (".", "kernels", "model", "engine", "convert", "eval", "text", "cli", "mesh"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "allow")
