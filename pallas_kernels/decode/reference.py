"""Decode as a plain softmax over every key of every page: for tests."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B Q N"]]:
    """See `api.decode`. Gathers every page of every sequence."""
    _, B, _, N, H = queries.shape
    K = cache.keys.shape[1]
    k, v = (
        array[layer][:, page_table]
        .transpose(1, 0, 2, 3, 4)
        .reshape(B, K, -1, H)
        .repeat(N // K, 1)
        .astype(jnp.float32)
        for array in (cache.keys, cache.values)
    )
    k_pos = shard.position(jnp.arange(k.shape[2], dtype=jnp.int32))
    scores = jnp.einsum("VBQNH,BNSH->VBQNS", queries.astype(jnp.float32), k)
    if geometry is None:
        scores = scores[0]
    else:
        view = geometry.view(positions[..., None], k_pos)
        scores = jnp.take_along_axis(scores, view[None, :, :, None], axis=0)[0]
    visible = (k_pos <= positions[..., None])[:, :, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    lse = jnp.logaddexp.reduce(scores, axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - lse[..., None]), 0)
    read = visible.any((1, 2))[:, None, :, None]
    out = jnp.einsum("BQNS,BNSH->BQNH", weights, jnp.where(read, v, 0))
    return out.astype(queries.dtype), lse
