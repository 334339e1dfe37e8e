import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tolerances import assert_close

from pallas_kernels import backend
from pallas_kernels.cases import CASES
from pallas_kernels.tiles import Tiles

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
    return (jnp.asarray(part) for part in cache)


PREFILL = {name: backend.load("prefill", name).prefill for name in backend.on("cpu")}
DECODE = {name: backend.load("decode", name).decode for name in backend.on("cpu")}
# Tiles so small that a slice has several, one of them partly padding.
PREFILL["xla in tiles"] = functools.partial(PREFILL["xla"], tiles=Tiles(q=10, k=4))
DECODE["xla in tiles"] = functools.partial(DECODE["xla"], tile=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", PREFILL)
def test_prefill_matches_the_oracle(name, case, dtype):
    rng, cache, flat, table = random_inputs(case, jnp.dtype(dtype))
    T, N, H = case.slice_len, case.num_heads, case.head_dim
    views = 1 if case.geometry is None else 3
    attend = jax.jit(functools.partial(PREFILL[name], geometry=case.geometry))
    for start in (0, 1, case.page, 2 * case.page + 3, len(flat[0]) - T):
        length = int(rng.integers(1, T + 1))
        queries = rng.standard_normal((views, T, N, H)).astype(dtype)
        keys, values = poison(cache, case, table, start + length)
        out, lse = attend(
            jnp.asarray(queries),
            keys,
            values,
            jnp.int32(LAYER),
            jnp.asarray(table),
            jnp.int32(start),
            jnp.int32(length),
        )
        expected, expected_lse = oracle.attention(
            queries, flat[0], flat[1], start, length, case.geometry
        )
        assert out.dtype == dtype
        assert lse.dtype == jnp.float32
        assert_close(out[:length], expected[:length])
        assert_close(lse[:length], expected_lse[:length])
        assert np.isfinite(np.asarray(out, np.float32)).all() or name == "reference"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", DECODE)
def test_decode_matches_the_oracle_and_idle_rows_are_empty(name, case, dtype):
    rng, cache, flat, table = random_inputs(case, jnp.dtype(dtype))
    N, H = case.num_heads, case.head_dim
    views = 1 if case.geometry is None else 3
    attend = jax.jit(functools.partial(DECODE[name], geometry=case.geometry))
    last = len(flat[0]) - 1
    positions = np.array([0, case.page - 1, -1, case.page, last // 2, last], np.int32)
    queries = rng.standard_normal((views, len(positions), N, H)).astype(dtype)
    keys, values = poison(cache, case, table, last + 1)
    tables = np.tile(table, (len(positions), 1))
    tables[2] = 0
    out, lse = attend(
        jnp.asarray(queries),
        keys,
        values,
        jnp.int32(LAYER),
        jnp.asarray(tables),
        jnp.asarray(positions),
    )
    for row, position in enumerate(positions):
        if position < 0:
            assert (np.asarray(out[row], np.float32) == 0).all()
            assert (np.asarray(lse[row]) == -np.inf).all()
            continue
        expected, expected_lse = oracle.attention(
            queries[:, row : row + 1], flat[0], flat[1], int(position), 1, case.geometry
        )
        assert_close(out[row], expected[0])
        assert_close(lse[row], expected_lse[0])
