"""jax's interpreter of Mosaic GPU kernels, quick enough for tests, and the races that it finds."""

import functools
import threading

import jax
import pytest
from jax._src.pallas.mosaic.interpret import thread_map

from pallas_kernels.mosaic_gpu import call

INTERPRET = call.interpreter(detect_races=True, uninitialized_memory="nan")
_COMPILING = threading.Lock()


@functools.lru_cache(maxsize=8)
def _compiled(jaxpr, count, *shapes):
    def run(*args):
        return jax.core.eval_jaxpr(jaxpr, args[:count], *args[count:])

    return jax.jit(run).lower(*shapes).compile()


def _run_jaxpr(jaxpr, consts, *args):
    """Run a warpgroup: jax before 0.11 compiles it anew for each one of each block."""
    args = *consts, *args
    with _COMPILING:
        run = _compiled(jaxpr, len(consts), *map(jax.typeof, args))
    run(*args)


@pytest.fixture
def interpreted(monkeypatch, capfd):
    """Fails a test where two warpgroups, or one and its copies, may meet."""
    monkeypatch.setattr(thread_map, "_run_jaxpr", _run_jaxpr)
    yield
    printed = capfd.readouterr().out
    assert "RACE DETECTED" not in printed, printed
