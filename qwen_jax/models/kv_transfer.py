"""Keys and values of consecutive tokens of all layers, out of a cache and into another.

Outside a cache they have neither pages nor shards, so that another mesh can take them. On a
mesh the tokens are divided along `seq`, in one piece each, and the heads along `tensor`.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_kv import PagedKV
from qwen_jax.distributed.sharding import RULES
from qwen_jax.models import sequence_parallel
from qwen_jax.models.kv_cache import read_slice, write_slice


def placement(mesh: Mesh, size: int) -> NamedSharding:
    """Where keys and values of `size` tokens lie outside the cache.

    Each device along `seq` has all of them if it does not divide them.
    """
    tokens = RULES.tokens if size % mesh.shape["seq"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(None, tokens, RULES.kv_heads))


def extract_kv(
    cache: PagedKV, page_table: Int[Array, " P"], start: Int[Array, ""], *, size: int
) -> tuple[Float[Array, "L T K H"], Float[Array, "L T K H"]]:
    """Keys and values of `size` tokens of a sequence from `start` on, bit for bit.

    Those that its pages do not hold mean nothing. Of a bfloat16 that is no number, CPUs keep
    only that.
    """
    split = sequence_parallel.splits(size)

    def read(part, cache, _, rest, __):
        layer, table, start = rest
        found = read_slice(cache, layer, table, start, size, part.shard)
        return cache, tuple(part.scatter(each) for each in found), None

    def of_layer(_, layer):
        return None, sequence_parallel.run(
            read, cache, (), (layer, page_table, start), split=split
        )[1]

    layers = jnp.arange(cache.keys.shape[0], dtype=jnp.int32)
    return jax.lax.scan(of_layer, None, layers)[1]


def insert_kv(
    cache: PagedKV,
    keys: Float[Array, "L T K H"],
    values: Float[Array, "L T K H"],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> PagedKV:
    """The cache with the first `length` of T tokens written, from `start` of a sequence on."""
    split = sequence_parallel.splits(keys.shape[1])

    def write(part, cache, rows, rest, _):
        layer, table, start, length = rest
        key, value = map(part.all_tokens, rows)
        return write_slice(cache, layer, key, value, table, start, length, part.shard), None, None

    def of_layer(layer, cache):
        rows, rest = (keys[layer], values[layer]), (layer, page_table, start, length)
        return sequence_parallel.run(write, cache, rows, rest, split=split)[0]

    return jax.lax.fori_loop(0, keys.shape[0], of_layer, cache)


def copy_page(cache: PagedKV, source: Int[Array, ""], target: Int[Array, ""]) -> PagedKV:
    """The cache with one page the same as another, in place if donated."""

    def copy(array):
        page = jax.lax.dynamic_index_in_dim(array, source, 2)
        return jax.lax.dynamic_update_index_in_dim(array, page, target, 2)

    return jax.tree.map(copy, cache)
