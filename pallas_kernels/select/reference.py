"""The vote written as one softmax: `[N, R, S]` weights, for tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.shard import WHOLE, Shard


def vote(
    queries: Float[Array, "views R N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    shard: Shard = WHOLE,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """Sums of softmax weights by column and by diagonal; see `api.select`."""
    _, R, N, H = queries.shape
    K, page = cache.keys.shape[1], cache.page
    k = cache.keys[layer][:, page_table].reshape(K, -1, H).repeat(N // K, 0).astype(jnp.float32)
    q_pos = start + length - R + jnp.arange(R, dtype=jnp.int32)
    k_pos = shard.position(jnp.arange(k.shape[1], dtype=jnp.int32))
    scores = jnp.einsum("VRNH,NSH->VNRS", queries.astype(jnp.float32), k)
    if geometry is None:
        scores = scores[0]
    else:
        view = geometry.view(q_pos[:, None], k_pos[None, :])
        scores = jnp.take_along_axis(scores, view[None, None], axis=0)[0]
    visible = (k_pos <= q_pos[:, None]) & (q_pos >= start)[:, None]
    lse = shard.merge_lse(jax.nn.logsumexp(scores, axis=-1, where=visible))
    weights = jnp.where(visible, jnp.exp(scores - lse[..., None]), 0)
    # The weight of row r in column c lies on the diagonal that ends in column c + R - 1 - r.
    of_page = weights.reshape(N, R, -1, page)
    moved = [jnp.pad(of_page[:, r], ((0, 0), (0, 0), (R - 1 - r, r))) for r in range(R)]
    diagonals = sum(moved, jnp.zeros(()))
    own, over = diagonals[..., :page], diagonals[..., page:]
    return weights.sum(1), (own + shard.shift_overflow(over, page)).reshape(N, -1)
