import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle, sparse_oracle
from support.tolerances import assert_close
from test_prefill_decode import LAYER, poison, random_inputs

from pallas_kernels import plan as plans
from pallas_kernels.cases import CASES, Case
from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.prefill import xla

COLUMNS = 11
PREFILL = {name: backend.load("prefill", name).prefill for name in backend.on("cpu")}
PREFILL["xla"] = functools.partial(xla.prefill, width=8)  # several steps even here


@functools.cache
def sparse(name, case, tiles):
    def run(queries, kv, table, start, length, verticals, slashes):
        plan = plans.build(
            verticals,
            slashes,
            start,
            length,
            num_queries=case.slice_len,
            num_columns=COLUMNS,
            tiles=tiles,
        )
        args = queries, kv, jnp.int32(LAYER), table, start, length
        mask = plans.to_mask(plan, start, length, num_keys=verticals.shape[1])
        return *PREFILL[name](*args, geometry=case.geometry, plan=plan), mask

    return jax.jit(run)


def random_selection(rng, heads, S, end, budget):
    verticals, slashes = np.zeros((2, heads, S), bool)
    for head in range(heads):
        verticals[head, rng.permutation(end)[: min(budget, COLUMNS)]] = True
        slashes[head, rng.permutation(end)[:budget]] = True
    return verticals, slashes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tiles", [Tiles(q=6, k=4), Tiles(q=8, k=2)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", PREFILL)
def test_a_plan_gives_dense_attention_under_its_mask(name, case, tiles, dtype):
    rng, cache, flat, table = random_inputs(case, jnp.dtype(dtype))
    T, N, H = case.slice_len, case.num_heads, case.head_dim
    views = 1 if case.geometry is None else 3
    S = len(flat[0])
    for start, budget in ((0, 3), (case.page + 1, 0), (S - T, 2), (S - T - 1, 5)):
        length = int(rng.integers(1, T + 1))
        queries = rng.standard_normal((views, T, N, H)).astype(dtype)
        kv = poison(cache, case, table, start + length)
        verticals, slashes = random_selection(rng, N, S, start + length, budget)
        slashes[0] = 0  # a head of columns alone
        out, lse, mask = sparse(name, case, tiles)(
            jnp.asarray(queries),
            kv,
            jnp.asarray(table),
            jnp.int32(start),
            jnp.int32(length),
            verticals,
            slashes,
        )
        expected, expected_lse = oracle.attention(
            queries, flat[0], flat[1], start, length, case.geometry, np.asarray(mask)
        )
        out, lse = np.asarray(out[:length], np.float64), np.asarray(lse[:length])
        empty = expected_lse[:length] == -np.inf
        np.testing.assert_array_equal(lse == -np.inf, empty)
        assert (out[empty] == 0).all()
        if budget:
            assert_close(jnp.asarray(out, dtype), expected[:length])
            assert_close(lse[~empty], expected_lse[:length][~empty])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_plan_of_everything_is_dense_attention_and_recall_grows_to_one(case):
    rng, cache, flat, table = random_inputs(case, np.float32)
    T, N, H = case.slice_len, case.num_heads, case.head_dim
    views = 1 if case.geometry is None else 3
    S = len(flat[0])
    start, length = S - T, T
    queries = rng.standard_normal((views, T, N, H)).astype(np.float32)
    kv = poison(cache, case, table, S)
    args = jnp.asarray(queries), kv, jnp.asarray(table)
    dense, dense_lse = jax.jit(functools.partial(xla.prefill, geometry=case.geometry))(
        *args[:2], jnp.int32(LAYER), args[2], jnp.int32(start), jnp.int32(length)
    )
    order = rng.permutation(S)
    recall = np.zeros((T, N))
    for budget in (0, 1, 4, 16, S):
        slashes = np.zeros((N, S), bool)
        slashes[:, order[:budget]] = True
        out, lse, _ = sparse("xla", case, Tiles(q=4, k=2))(
            *args, jnp.int32(start), jnp.int32(length), np.zeros((N, S), bool), slashes
        )
        grown = np.exp(np.asarray(lse) - np.asarray(dense_lse))
        assert (grown >= recall - 1e-6).all()
        assert (grown <= 1 + 1e-5).all()
        recall = grown
    assert_close(out, dense)
    assert_close(lse, dense_lse)


COUNTED = Case(
    num_heads=1,
    num_kv_heads=1,
    head_dim=96,
    page=8,
    geometry=ChunkGeometry(chunk_size=50, local_size=10),
    slice_len=40,
)


@pytest.mark.parametrize("tiles", [Tiles(q=8, k=4), Tiles(q=5, k=8), Tiles(q=64, k=1)])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_selected_key_is_read_once_and_nothing_else_but_its_block(tiles, data):
    """Queries of zero weigh all keys alike, and key s has value e_s: the output counts keys."""
    S = COUNTED.head_dim
    chunk = COUNTED.geometry.chunk_len
    start = data.draw(st.integers(0, S - 1), "start")
    length = data.draw(st.integers(1, min(S - start, chunk - start % chunk)), "length")
    end = start + length
    positions = st.integers(0, end - 1)
    columns = sorted(data.draw(st.sets(positions, max_size=COLUMNS), "columns"))
    diagonals = sorted(data.draw(st.sets(positions), "diagonals"))
    selected = np.zeros((2, 1, S), bool)
    selected[0, 0, columns] = selected[1, 0, diagonals] = True
    ones = np.broadcast_to(np.eye(S, dtype=np.float32), (2, 1, S, S))
    cache = jnp.asarray(ones.reshape(2, 1, S // COUNTED.page, COUNTED.page, S))
    queries = jnp.zeros((3, COUNTED.slice_len, 1, S))
    table = jnp.arange(S // COUNTED.page, dtype=jnp.int32)
    where = table, jnp.int32(start), jnp.int32(length)
    out, lse, _ = sparse("xla", COUNTED, tiles)(queries, PagedKV(cache, cache), *where, *selected)
    times = np.asarray(out)[:length, 0] * np.exp(np.asarray(lse))[:length]

    blocks = sparse_oracle.blocks(
        diagonals, start, length, COUNTED.geometry, tiles.q, tiles.k
    ).repeat(tiles.k, 1)
    blocks[:, columns] = True
    expected = blocks.repeat(tiles.q, 0)[:length, :end]
    expected &= np.arange(end) <= start + np.arange(length)[:, None]
    np.testing.assert_allclose(times[:, :end], expected, atol=1e-4)
    assert (times[:, end:] == 0).all()
    cells = sparse_oracle.cells(columns, diagonals, start, length, COUNTED.geometry)
    assert not (cells & ~expected).any()
