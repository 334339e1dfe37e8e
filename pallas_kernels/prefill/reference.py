"""Prefill written as one dense softmax: quadratic memory, for tests."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import SparsePlan, to_mask
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
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """See `api.prefill`. Holds `[views, N, T, S]` scores."""
    _, T, N, H = queries.shape
    K = cache.keys.shape[1]
    k, v = (
        array[layer][:, page_table].reshape(K, -1, H).repeat(N // K, 0).astype(jnp.float32)
        for array in (cache.keys, cache.values)
    )
    q_pos = start + jnp.arange(T, dtype=jnp.int32)
    k_pos = shard.position(jnp.arange(k.shape[1], dtype=jnp.int32))
    scores = jnp.einsum("VTNH,NSH->VNTS", queries.astype(jnp.float32), k)
    if geometry is None:
        scores = scores[0]
    else:
        view = geometry.view(q_pos[:, None], k_pos[None, :])
        scores = jnp.take_along_axis(scores, view[None, None], axis=0)[0]
    visible = (k_pos <= q_pos[:, None]) & (k_pos < start + length)
    if plan is not None:
        visible &= to_mask(plan, start, length, num_keys=k.shape[1], shard=shard)[:, :T]
    scores = jnp.where(visible, scores, -jnp.inf)
    lse = jnp.logaddexp.reduce(scores, axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - lse[..., None]), 0)
    v = jnp.where((k_pos < start + length)[:, None], v, 0)
    out = jnp.einsum("NTS,NSH->TNH", weights, v)
    return out.astype(queries.dtype), lse.T
