"""The prefill operation that users call."""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import backend
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import SparsePlan
from pallas_kernels.shard import WHOLE, Shard


def prefill(
    queries: Float[Array, "views T N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    plan: SparsePlan | None = None,
    shard: Shard = WHOLE,
    backend_name: backend.Choice = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attend from a slice of one sequence to its own keys and all before, in the cache.

    Query head n reads kv head `n // (N / K)`. Key s of the sequence lies in page
    `page_table[s // page]`, row `s % page`, rotated to `geometry.key_position(s)`. Rows of a
    page past the sequence's end may hold anything, NaN too, and must not show.

    Args:
        queries: rotated to each of `geometry.query_positions`, in their order, and
            multiplied by the softmax scale; one view if `geometry` is None.
        cache: keys and values of all layers, read in place.
        layer: which layer of the cache to read.
        start: position of the first query.
        length: queries that count; the rows after them are padding.
        plan: which of these keys each query reads; None for all.
        shard: which part of each page the cache holds; all shards' results, merged, are those
            of the whole. A plan is of a shard's own keys.
        backend_name: one of `backend.NAMES`, or None for the preferred one of the device.

    Returns:
        The output, in the dtype of the queries, and the natural log-sum-exp, in
        float32. Rows of padding are finite and mean nothing; a row that reads no key
        has output 0 and log-sum-exp -inf.

    Raises:
        Unsupported: if the backend does not run here or cannot take these shapes.
    """
    return backend.call(
        "prefill",
        backend_name,
        queries,
        cache,
        layer,
        page_table,
        start,
        length,
        geometry=geometry,
        plan=plan,
        shard=shard,
    )
