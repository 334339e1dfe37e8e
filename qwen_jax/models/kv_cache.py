"""Paged KV cache: allocation, writes, reads.

A page holds consecutive tokens of one sequence, for all layers. Page 0 belongs to no
sequence: padding is written there. On a mesh each page is divided along its tokens, so that all
devices have the same page table, and the parts of a sequence are distributed round-robin
(`pallas_kernels.shard`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.shard import WHOLE, Shard
from qwen_jax.config import ModelConfig

AXES = ("layers", "kv_heads", "pages", "page", "head_dim")
"""Logical axes of the arrays of a `PagedKV`."""


def init(config: ModelConfig, num_pages: int, page: int, dtype=jnp.bfloat16) -> PagedKV:
    """Allocates a cache of zeros; `num_pages` includes page 0, to which padding is written."""
    shape = (config.num_layers, config.num_kv_heads, num_pages, page, config.head_dim)
    return PagedKV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write_slice(
    cache: PagedKV,
    layer: Int[Array, ""],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    shard: Shard = WHOLE,
) -> PagedKV:
    """Writes the first `length` of T consecutive tokens of one sequence, in place if donated.

    Writes page by page: a scatter of single rows would be slower by a factor of the page size.

    Args:
        keys: keys of the tokens; cast to the dtype of the cache, as are `values`.
        page_table: pages of the sequence, in order.
        start: position of the first token in the sequence.
        shard: part of each page that the cache holds; other tokens are skipped.
    """
    T, page, P = keys.shape[0], cache.page, page_table.shape[0]
    row = jnp.arange(page, dtype=jnp.int32)
    whole_page = page * shard.count

    def write(i, arrays):
        slot = start // whole_page + i
        first = shard.position(slot * page) - start  # of this page, in the slice
        index = first + row
        mine = (index >= 0) & (index < length)
        target = jnp.where(mine.any() & (slot < P), page_table[jnp.minimum(slot, P - 1)], 0)
        at = (layer, 0, target, 0, 0)

        def put(array, new):
            # Shifted by one page, so that rows before the slice do not clamp the window.
            padded = jnp.pad(new, ((page, page), (0, 0), (0, 0)))
            window = jax.lax.dynamic_slice_in_dim(padded, page + first, page)
            window = window.swapaxes(0, 1)[None, :, None].astype(array.dtype)
            old = jax.lax.dynamic_slice(array, at, window.shape)
            window = jnp.where(mine[:, None], window, old)
            return jax.lax.dynamic_update_slice(array, window, at)

        return put(arrays[0], keys), put(arrays[1], values)

    pages = -(-T // whole_page) + 1 if T > 1 else 1  # that T consecutive tokens can touch
    arrays = jax.lax.fori_loop(0, pages, write, (cache.keys, cache.values))
    return PagedKV(*arrays)


def read_slice(
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    size: int,
    shard: Shard = WHOLE,
) -> tuple[Float[Array, "T K H"], Float[Array, "T K H"]]:
    """Reads keys and values of `size` consecutive tokens; 0 where another shard holds them."""
    page = cache.page
    positions = start + jnp.arange(size, dtype=jnp.int32)
    slot = positions // (page * shard.count)
    row = positions - shard.position(slot * page)
    mine = (row >= 0) & (row < page)
    heads = jnp.arange(cache.keys.shape[1])
    pages = jnp.take(page_table, slot, mode="clip")[:, None]

    def read(array):
        found = array[layer, heads, pages, jnp.where(mine, row, 0)[:, None]]
        return jnp.where(mine[:, None, None], found, 0)

    return read(cache.keys), read(cache.values)


def write_tokens(
    cache: PagedKV,
    layer: Int[Array, ""],
    keys: Float[Array, "B K H"],
    values: Float[Array, "B K H"],
    page_table: Int[Array, "B P"],
    positions: Int[Array, " B"],
    shard: Shard = WHOLE,
) -> PagedKV:
    """Writes one token of each of B sequences.

    An idle row (position -1) is written to page 0, as are tokens of other shards.
    """
    page = cache.page
    slot = jnp.maximum(positions, 0) // (page * shard.count)
    row = positions - shard.position(slot * page)
    mine = (positions >= 0) & (row >= 0) & (row < page)
    target = jnp.take_along_axis(page_table, slot[:, None], axis=1)[:, 0]
    target = jnp.where(mine, target, 0)
    row = jnp.where(mine, row, 0)

    def write(b, arrays):
        at = (layer, 0, target[b], row[b], 0)

        def put(array, new):
            row = new[b][None, :, None, None].astype(array.dtype)
            return jax.lax.dynamic_update_slice(array, row, at)

        return put(arrays[0], keys), put(arrays[1], values)

    return PagedKV(*jax.lax.fori_loop(0, keys.shape[0], write, (cache.keys, cache.values)))
