"""Kernels for TPUs in the interpreter, which raises on races, stale memory and stray reads."""

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

NOWHERE = 2**30  # a page outside the cache: to read it is an error


def interpreter(cores=None):
    return pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        num_cores_or_threads=cores or 1,
    )


INTERPRET = interpreter()


class Raceless:
    """Cases of a kernel that end without a race."""

    def done(self):
        assert not interpret_pallas_call.races.races_found
