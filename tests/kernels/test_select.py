import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparse_oracle
from test_prefill_decode import LAYER, poison, random_inputs
from tolerances import assert_close

from pallas_kernels import backend
from pallas_kernels.cases import CASES
from pallas_kernels.select import api
from pallas_kernels.select.top import top

VOTE = {name: backend.load("select", name).vote for name in backend.NAMES}
VOTE["xla in tiles"] = functools.partial(VOTE["xla"], tile=4)
LAST_Q = 10


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", VOTE)
def test_votes_equal_the_sums_of_softmax_by_column_and_diagonal(name, case):
    rng, cache, flat, table = random_inputs(case, np.float32)
    N, H = case.num_heads, case.head_dim
    views = 1 if case.geometry is None else 3
    vote = jax.jit(functools.partial(VOTE[name], geometry=case.geometry))
    for start, length in ((0, 1), (0, LAST_Q + 3), (1, 4), (2 * case.page + 3, 7), (5, LAST_Q)):
        queries = rng.standard_normal((views, LAST_Q, N, H)).astype(np.float32)
        keys, _ = poison(cache, case, table, start + length)
        columns, diagonals = vote(
            queries, keys, jnp.int32(LAYER), table, jnp.int32(start), jnp.int32(length)
        )
        expected = sparse_oracle.votes(queries, flat[0], start, length, case.geometry)
        for actual, sums in zip((columns, diagonals), expected, strict=True):
            assert_close(actual[:, : start + length], sums)
            assert (np.asarray(actual)[:, start + length :] == 0).all()


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
        jnp.asarray(keys),
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
