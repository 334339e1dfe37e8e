"""Prefill in XLA operations, in tiles of several sizes, and the reference, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sparse_oracle
from support.paged import LAYER, PAGES, poison, random_inputs
from support.prefill_cases import Dense, Planned, of
from support.tolerances import assert_close

from pallas_kernels.cases import CASES, Case
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.prefill import reference, xla

STEPS = {"tiles": Tiles(q=10, k=4), "width": 8}
COLUMNS = 11


def slices(case):
    """Starts at borders of pages, the last one such that the slice ends with the cache."""
    rng = np.random.default_rng(0)
    starts = 0, 1, case.page, 2 * case.page + 3, (PAGES - 1) * case.page - case.slice_len
    return [(start, int(rng.integers(1, case.slice_len + 1))) for start in starts]


def listed(case):
    rng, last = np.random.default_rng(0), (PAGES - 1) * case.page - case.slice_len
    for start, budget in ((0, 3), (case.page + 1, 0), (last, 2), (last - 1, 5)):
        yield start, int(rng.integers(1, case.slice_len + 1)), budget, budget


DENSE = [
    of(name, *slices(case), dtype=dtype)
    for name, case in CASES.items()
    for dtype in ("float32", "bfloat16")
]
PLANNED = [
    of(name, *listed(case), dtype=dtype, tiles=tiles)
    for name, case in CASES.items()
    for tiles in (Tiles(q=6, k=4), Tiles(q=8, k=2))
    for dtype in ("float32", "bfloat16")
]


class TestReference(Dense, Planned):
    function = staticmethod(reference.prefill)
    cases, columns, dense, planned = CASES, COLUMNS, DENSE, PLANNED
    finite = False


class TestXla(Dense):
    function = staticmethod(xla.prefill)
    cases, dense = CASES, DENSE


class TestXlaInTiles(Dense, Planned):
    """Tiles of which a slice has several, one partly padding, and plans of several steps."""

    function = staticmethod(xla.prefill)
    options = STEPS
    cases, columns, dense, planned = CASES, COLUMNS, DENSE, PLANNED


def sparse(case, tiles):
    compiled = TestXlaInTiles.compiled(case, tiles)
    return lambda queries, kv, *rest: compiled(queries, kv, jnp.int32(LAYER), *rest)


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
        out, lse, _ = sparse(case, Tiles(q=4, k=2))(
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
    out, lse, _ = sparse(COUNTED, tiles)(queries, PagedKV(cache, cache), *where, *selected)
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
