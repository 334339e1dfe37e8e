"""Settings that every test shares; set before jax is imported anywhere."""

import gc
import os
import tempfile

import tpu_compile

os.environ.setdefault("TRITON_INTERPRET", "1")
# Warpgroups of the Mosaic GPU interpreter wait in XLA's threads: with two, none is left to go on.
os.environ.setdefault("NPROC", "8")
for name, value in tpu_compile.ENVIRONMENT.items():
    os.environ.setdefault(name, value)
# What one child process compiles serves the others of this session, and none of the user's does.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="qwen-jax-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from support import compilation  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "allow")
OPTIMIZED = {"optimized", "demo", "long", "tpu_aot", "gpu_aot"}


def pytest_collection_finish():
    """Spares the collector of garbage, which each failed file calls, what is imported by now."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compiles soon what runs little, and speaks as a command does at first, whoever ran before."""
    from qwen_jax.distributed import verbosity  # after jaxtyping, which must see it imported

    verbosity.set_level(verbosity.Level.SHORT)
    optimized = not OPTIMIZED.isdisjoint(mark.name for mark in item.iter_markers())
    compilation.optimize(optimized)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Frees the programs of a module after it: a worker would hold gigabytes of them."""
    if nextitem is not None and nextitem.path != item.path:
        jax.clear_caches()


@pytest.fixture
def unchecked():
    """Annotations unchecked: `lower` puts descriptions of arrays where arrays are asked for."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
