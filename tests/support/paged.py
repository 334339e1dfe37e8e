"""Random keys and values in a paged cache, the rest of which is nan."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_kv import PagedKV

LAYERS, LAYER, PAGES = 2, 1, 12


def random_inputs(case, dtype, seed=0):
    """A cache whose pages lie in random order, every unused row poisoned with nan."""
    rng = np.random.default_rng(seed)
    K, H, page = case.num_kv_heads, case.head_dim, case.page
    S = (PAGES - 1) * page
    table = rng.permutation(np.arange(1, PAGES)).astype(np.int32)
    flat = rng.standard_normal((2, S, K, H)).astype(dtype)
    cache = np.full((2, LAYERS, K, PAGES, page, H), np.nan, dtype)
    for s in range(S):
        cache[:, LAYER, :, table[s // page], s % page] = flat[:, s]
    return rng, cache, flat, table


def poison(cache, case, table, kv_len):
    """The cache as it is when only `kv_len` tokens have been written."""
    cache = cache.copy()
    for s in range(kv_len, len(table) * case.page):
        cache[:, :, :, table[s // case.page], s % case.page] = np.nan
    return PagedKV(*map(jnp.asarray, cache))
