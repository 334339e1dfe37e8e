"""Compilation of what tests run once, on little: as soon as possible, or as users do."""

import functools
import os

import jax
from jax._src import compiler

# XLA's older emitters of loops, and one module for LLVM: a third of the time.
_SOON = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
_options = compiler.get_compile_options


@functools.wraps(_options)
def _options_of_tests(*arguments, env_options_overrides=None, backend=None, **more):
    if jax.config.read("jax_disable_most_optimizations") and backend.platform == "cpu":
        env_options_overrides = _SOON | (env_options_overrides or {})
    return _options(
        *arguments, env_options_overrides=env_options_overrides, backend=backend, **more
    )


def optimize(wanted: bool) -> None:
    """Has programs compiled as users' are, and each anew; or else soon, to run slowly, and once."""
    from qwen_jax.files import compile_cache  # after jaxtyping, which must see it imported

    compiler.get_compile_options = _options_of_tests
    jax.config.update("jax_disable_most_optimizations", not wanted)
    jax.config.update("jax_enable_compilation_cache", not wanted)
    compile_cache.begin()  # in whose files no worker reads half of what another writes
    if programs := os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # commands that tests run use it
        jax.config.update("jax_compilation_cache_dir", os.path.join(programs, "of-tests"))
