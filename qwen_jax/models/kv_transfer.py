"""KV transfer: extracts keys and values of consecutive tokens from a cache, or inserts them.

Outside a cache they have neither pages nor shards, so that another mesh can take them. On a
mesh the tokens are divided along `seq`, contiguously, and the heads along `tensor`.
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
    """Returns the sharding of keys and values [L, T, K, H] of `size` tokens outside the cache.

    Tokens are replicated along `seq` if its size does not divide them.
    """
    tokens = RULES.tokens if size % mesh.shape["seq"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(None, tokens, RULES.kv_heads))


def extract_kv(
    cache: PagedKV, page_table: Int[Array, " P"], start: Int[Array, ""], *, size: int
) -> tuple[Float[Array, "L T K H"], Float[Array, "L T K H"]]:
    """Copies keys and values of `size` tokens of a sequence from `start` on, bit for bit.

    Tokens beyond its pages are arbitrary. On CPUs the payload of a bfloat16 NaN may change.
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
    """Writes the first `length` of T tokens into the pages of a sequence, from `start` on."""
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
    """Copies page `source` onto page `target`, in place if the cache is donated."""

    def copy(array):
        page = jax.lax.dynamic_index_in_dim(array, source, 2)
        return jax.lax.dynamic_update_index_in_dim(array, page, target, 2)

    return jax.tree.map(copy, cache)
