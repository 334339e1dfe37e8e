"""The decode operation that users call."""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import backend
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.shard import WHOLE, Shard


def decode(
    queries: Float[Array, "views B Q N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, "B P"],
    positions: Int[Array, "B Q"],
    *,
    geometry: ChunkGeometry | None,
    shard: Shard = WHOLE,
    backend_name: backend.Choice = None,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B Q N"]]:
    """Attend from the newest tokens of each sequence to themselves and all before them.

    Arguments are those of `prefill.prefill`, with a row per sequence. The cache holds the keys
    of all these tokens; each token reads those at positions up to its own.

    Args:
        positions: position of each token, ascending in a row; -1 marks an idle token, whose
            output is 0 and whose log-sum-exp is -inf. Idle tokens follow the others of
            their row, which may have none.
        shard: which part of each page the cache holds.

    Raises:
        Unsupported: if the backend does not run here or cannot take these shapes.
    """
    args = queries, cache, layer, page_table, positions
    return backend.call("decode", backend_name, *args, geometry=geometry, shard=shard)
