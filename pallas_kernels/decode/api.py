"""The decode operation that users call."""

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
    backend_name: backend.Choice = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """Attention of one token of each sequence over itself and all before it.

    The arguments are those of `prefill.prefill`, with a row per sequence.

    Args:
        positions: position of each token; -1 marks an idle row, whose output is 0
            and whose log-sum-exp is -inf.

    Raises:
        Unsupported: if the backend does not run here or cannot take these shapes.
    """
    args = queries, keys, values, layer, page_table, positions
    return backend.call("decode", backend_name, *args, geometry=geometry)
