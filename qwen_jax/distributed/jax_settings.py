"""JAX settings under which a model is loaded and run."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Sets the JAX settings that the model needs, whatever the process or environment says.

    Within the context numbers have at most 32 bits, ranks are promoted, NumPy arrays are
    transferred to devices implicitly, and jit compiles.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
        jax.disable_jit(False),
    ):
        yield
