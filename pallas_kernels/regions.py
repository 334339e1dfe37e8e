"""Where the keys end that a row sees in each view, for kernels that stream all keys.

Of a row, the keys of each view of Dual Chunk Attention are one run of local keys: those of its own
chunk end with itself, those of the chunk before where its own begins, all older ones before these.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.shard import Shard


def ends(
    positions: Int[Array, "*rows"], geometry: ChunkGeometry | None, shard: Shard
) -> Int[Array, "views *rows"]:
    """Where the local keys end that each row sees in each view; those of the last one begin at 0.

    A row at position -1 sees none.
    """
    last = [positions + 1]
    if geometry is not None:
        chunk = positions // geometry.chunk_len
        last += [(chunk - back).clip(0) * geometry.chunk_len for back in (0, 1)]
    return jnp.stack([shard.before(each) for each in last])
