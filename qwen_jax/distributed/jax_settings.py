"""Settings of jax under which a model is loaded and run."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Within it jax does as the model needs it, whatever the process or its environment asks for.

    Numbers have at most 32 bits, arrays of several ranks meet, numpy arrays go to devices, and what
    is jitted is compiled.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
        jax.disable_jit(False),
    ):
        yield
