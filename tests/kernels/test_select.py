import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import sparse_oracle
from support.tolerances import assert_close
from support.vote_cases import Vote, slices

from pallas_kernels.cases import CASES
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.select import api, reference, xla
from pallas_kernels.select.top import top

LAST_Q = 10


VOTING = tuple(
    slices(
        name,
        case.geometry,
        *((0, 1), (0, LAST_Q + 3), (1, 4), (2 * case.page + 3, 7), (5, LAST_Q)),
        N=case.num_heads,
        K=case.num_kv_heads,
        R=LAST_Q,
        H=case.head_dim,
        page=case.page,
        pages=11,
    )
    for name, case in CASES.items()
)


class TestReference(Vote):
    function = staticmethod(reference.vote)
    voting = VOTING


class TestXla(Vote):
    function = staticmethod(xla.vote)
    voting = VOTING


class TestXlaInTiles(Vote):
    function = staticmethod(xla.vote)
    options = MappingProxyType({"tile": 4})
    voting = VOTING


def test_top_is_the_stable_order_of_numpy_with_forced_entries_first():
    rng = np.random.default_rng(0)
    choose = jax.jit(top)
    for _ in range(40):
        S, end = 96, int(rng.integers(1, 97))
        votes = rng.choice([0, 1e-30, 0.25, 0.5, 1, 3], (5, S)).astype(np.float32)
        votes[0] = rng.random(S)
        votes[:, end:] = 0
        low = int(rng.integers(-20, end))
        high = low + int(rng.integers(0, 30))
        budget = np.array([rng.integers(0, S), 0, 1, end, 2**31 - 1], np.int32)
        actual = np.asarray(choose(votes, budget, low=low, high=high, end=end))
        for row, count in enumerate(budget):
            forced = np.arange(max(low, 0), min(high, end))
            expected = sparse_oracle.largest(votes[row, :end].astype(float), count, forced)
            np.testing.assert_array_equal(actual[row].nonzero()[0], expected)


def test_sinks_and_the_local_band_are_always_selected_and_count():
    rng = np.random.default_rng(1)
    page, S, N = 64, 512, 2
    keys = rng.standard_normal((1, 1, S // page + 1, page, 16)).astype(np.float32)
    table = np.arange(1, S // page + 1, dtype=np.int32)
    queries = rng.standard_normal((1, 64, N, 16)).astype(np.float32)
    start, length = 100, 333
    found = api.select(
        jnp.asarray(queries),
        PagedKV(*2 * [jnp.asarray(keys)]),
        jnp.int32(0),
        jnp.asarray(table),
        jnp.int32(start),
        jnp.int32(length),
        jnp.array([30, 130]),
        jnp.array([100, 2000]),
        geometry=None,
    )
    verticals, slashes = np.asarray(found.verticals), np.asarray(found.slashes)
    end = start + length
    assert verticals[0].nonzero()[0].tolist() == list(range(30))
    assert verticals[1, :30].all()
    assert verticals[1].sum() == 130
    assert slashes[0].nonzero()[0].tolist() == list(range(end - 100, end))
    assert slashes[1].nonzero()[0].tolist() == list(range(end))


PAGE, PAGES = 16, 30
# Chunks of 7 to 490 tokens: pieces have no region, one or two before their own.
GEOMETRIES = (
    None,
    ChunkGeometry(10, 3),
    ChunkGeometry(64, 27),
    ChunkGeometry(163, 62),
    ChunkGeometry(331, 31),
    ChunkGeometry(500, 10),
)


@functools.cache
def selection(geometry):
    def run(queries, kv, table, start, length, vertical, slash):
        args = queries, kv, jnp.int32(0), table, start, length
        votes = xla.vote(*args, geometry=geometry, tile=64)
        return votes, api.select(*args, vertical, slash, geometry=geometry, backend_name="xla")

    return jax.jit(run)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pieces_of_any_size_select_what_their_last_queries_attend_to(geometry):
    rng = np.random.default_rng(11)
    S, N, H, views = PAGE * PAGES, 4, 8, 1 if geometry is None else 3
    for _ in range(52):
        start = int(rng.integers(0, S - 1))
        room = S - start if geometry is None else geometry.chunk_len - start % geometry.chunk_len
        length = int(rng.integers(1, min(room, S - start) + 1))
        end = start + length
        table = rng.permutation(PAGES).astype(np.int32)
        flat = rng.standard_normal((S, 2, H)).astype(np.float32)
        flat[end:] = np.nan
        cache = np.zeros((1, 2, PAGES, PAGE, H), np.float32)
        cache[0][:, table] = flat.reshape(PAGES, PAGE, 2, H).transpose(2, 0, 1, 3)
        queries = rng.standard_normal((views, 64, N, H)).astype(np.float32)
        queries[:, : max(64 - length, 0)] = 1e3  # rows before the piece do not vote
        budgets = rng.integers(1, end + 40, (2, N)).astype(np.int32)
        budgets[:, 0] = 130, 100
        votes, found = selection(geometry)(
            jnp.asarray(queries),
            PagedKV(*2 * [jnp.asarray(cache)]),
            jnp.asarray(table),
            jnp.int32(start),
            jnp.int32(length),
            *jnp.asarray(budgets),
        )
        expected = sparse_oracle.piece_votes(queries, flat[:end], start, length, geometry)
        forced = np.arange(min(30, end)), np.arange(max(end - 100, 0), end)
        for kind in range(2):
            sums, mask = np.asarray(votes[kind]), np.asarray(found[kind])
            assert_close(sums[:, :end], expected[kind])
            assert not mask[:, end:].any()
            for n in range(N):
                chosen = mask[n].nonzero()[0]
                values = expected[kind][n]
                sparse_oracle.assert_largest(chosen, values, budgets[kind, n], forced[kind])
