"""The decode operation that users call."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import backend
from pallas_kernels.geometry import ChunkGeometry


def decode(
    queries: Float[Array, "views B N H"],
    keys: Float[Array, "L K pages page H"],
    values: Float[Array, "L K pages page H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B P"],
    positions: Int[Array, " B"],
    *,
    geometry: ChunkGeometry | None,
    backend_name: str | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """Attention of one token of each sequence over itself and all before it.

    The arguments are those of `prefill.prefill`, with a row per sequence.

    Args:
        positions: position of each token; -1 marks an idle row, whose output is 0
            and whose log-sum-exp is -inf.

    Raises:
        Unsupported: if the backend cannot take these shapes.
    """
    name = backend.choose(jax.default_backend(), backend_name)
    module = backend.load("decode", name)
    return module.decode(queries, keys, values, layer, page_table, positions, geometry=geometry)
