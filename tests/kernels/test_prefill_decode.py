import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.tolerances import assert_close

from pallas_kernels.cases import CASES
from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.tiles import Tiles
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
        kv = poison(cache, case, table, start + length)
        out, lse = attend(
            jnp.asarray(queries),
            kv,
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
def test_decode_matches_the_oracle_and_idle_tokens_are_empty(name, case, dtype):
    rng, cache, flat, table = random_inputs(case, jnp.dtype(dtype))
    N, H = case.num_heads, case.head_dim
    views = 1 if case.geometry is None else 3
    attend = jax.jit(functools.partial(DECODE[name], geometry=case.geometry))
    last = len(flat[0]) - 1
    # Consecutive tokens lie on both sides of each border of chunks in some row.
    rows = [(0, 1), (case.page - 1, 3), (0, 0), (case.page, 2), (last - 2, 3)]
    if case.geometry is not None:
        rows += [(case.geometry.chunk_len * n - 1, 3) for n in (1, 2, 3)]
    for Q in (1, 3):
        positions = np.full((len(rows), Q), -1, np.int32)
        for row, (first, count) in enumerate(rows):
            positions[row, : min(count, Q)] = first + np.arange(min(count, Q))
        queries = rng.standard_normal((views, len(rows), Q, N, H)).astype(dtype)
        kv = poison(cache, case, table, last + 1)
        tables = np.tile(table, (len(rows), 1))
        tables[2] = 0
        out, lse = attend(
            jnp.asarray(queries),
            kv,
            jnp.int32(LAYER),
            jnp.asarray(tables),
            jnp.asarray(positions),
        )
        assert out.dtype == dtype
        assert lse.dtype == jnp.float32
        idle = positions < 0
        assert (np.asarray(out, np.float32)[idle] == 0).all()
        assert (np.asarray(lse)[idle] == -np.inf).all()
        for row, (first, count) in enumerate(rows):
            if count:
                expected, expected_lse = oracle.attention(
                    queries[:, row], flat[0], flat[1], first, min(count, Q), case.geometry
                )
                busy = slice(min(count, Q))
                assert_close(out[row, busy], expected[busy])
                assert_close(lse[row, busy], expected_lse[busy])


@pytest.mark.parametrize("name", DECODE)
def test_rows_of_a_page_past_the_newest_token_do_not_show(name):
    case = CASES["tiles fit the chunk"]
    rng, cache, flat, table = random_inputs(case, jnp.dtype("float32"))
    positions = np.array([[17, 18, -1]], np.int32)
    queries = rng.standard_normal((3, 1, 3, case.num_heads, case.head_dim)).astype(np.float32)
    kv = poison(cache, case, table, 19)
    out, _ = DECODE[name](
        jnp.asarray(queries),
        kv,
        jnp.int32(LAYER),
        jnp.asarray(table[None]),
        jnp.asarray(positions),
        geometry=case.geometry,
    )
    expected, _ = oracle.attention(queries[:, 0], flat[0], flat[1], 17, 2, case.geometry)
    assert_close(out[0, :2], expected[:2])
    assert (np.asarray(out[0, 2]) == 0).all()
