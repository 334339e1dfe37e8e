"""The decode operation that users call."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import backend
from pallas_kernels.geometry import ChunkGeometry


def decode(
    queries: Float[Array, "views B Q N H"],
    keys: Float[Array, "L K pages page H"],
    values: Float[Array, "L K pages page H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B P"],
    positions: Int[Array, "B Q"],
    *,
    geometry: ChunkGeometry | None,
    backend_name: str | None = None,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B Q N"]]:
    """Attention of the newest tokens of each sequence over themselves and all before them.

    The arguments are those of `prefill.prefill`, with a row per sequence. The cache holds
    the keys of all these tokens; each token reads those at positions up to its own.

    Args:
        positions: position of each token, ascending in a row; -1 marks an idle token, whose
            output is 0 and whose log-sum-exp is -inf. Idle tokens follow the others of
            their row, which may have none.

    Raises:
        Unsupported: if the backend cannot take these shapes.
    """
    name = backend.choose(jax.default_backend(), backend_name)
    module = backend.load("decode", name)
    return module.decode(queries, keys, values, layer, page_table, positions, geometry=geometry)
