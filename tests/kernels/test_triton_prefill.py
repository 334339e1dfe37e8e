"""The Triton kernels of prefill in Triton's interpreter, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prefill_decode import LAYER, poison, random_inputs
from tolerances import assert_close

from pallas_kernels import plan as plans
from pallas_kernels.cases import Case
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.tiles import Tiles

pytest.importorskip("triton", reason="Triton (pip install triton) is not installed")
from triton_interpreter import interpreted  # noqa: E402, F401

from pallas_kernels.backend import Unsupported  # noqa: E402
from pallas_kernels.prefill import triton  # noqa: E402

pytestmark = pytest.mark.usefixtures("interpreted")
COLUMNS = 40
DENSE = Tiles(q=32, k=16)


def case_of(**sizes):
    usual = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 16, "page": 16, "geometry": None}
    return Case(slice_len=45, **usual | sizes)


# Slices of several tiles, caches of 11 pages.
CASES = {
    "one window": case_of(),
    "tiles fit the chunk": case_of(geometry=ChunkGeometry(80, 32)),
    "borders inside a tile": case_of(geometry=ChunkGeometry(57, 10), num_heads=2),
    "chunks smaller than a tile": case_of(geometry=ChunkGeometry(11, 4), num_heads=1),
    "a page is no multiple of a tile": case_of(page=12, geometry=ChunkGeometry(56, 24)),
    "two kv heads of seven": case_of(
        num_heads=14, num_kv_heads=2, page=32, geometry=ChunkGeometry(96, 32)
    ),
}


@functools.cache
def compiled(case, tiles, columns):
    """The kernel, dense for tiles None, else by a plan of these tiles."""

    def run(queries, keys, values, table, start, length, verticals, slashes):
        args = queries, keys, values, jnp.int32(LAYER), table, start, length
        options = {"geometry": case.geometry, "tiles": DENSE, "step": 16}
        if tiles is None:
            return *triton.prefill(*args, **options), None
        plan = plans.build(
            verticals,
            slashes,
            start,
            length,
            num_queries=case.slice_len,
            num_columns=columns,
            tiles=tiles,
        )
        mask = plans.to_mask(plan, start, length, num_keys=verticals.shape[1])
        return *triton.prefill(*args, **options, plan=plan, programs=3), mask

    return jax.jit(run)


def check(case, dtype, start, length, tiles=None, selected=None, seed=0):
    rng, cache, flat, table = random_inputs(case, jnp.dtype(dtype), seed)
    S, N = len(flat[0]), case.num_heads
    views = 1 if case.geometry is None else 3
    queries = rng.standard_normal((views, case.slice_len, N, case.head_dim)).astype(dtype)
    keys, values = poison(cache, case, table, start + length)
    if selected is None:
        selected = np.zeros((2, N, S), bool)
    out, lse, mask = compiled(case, tiles, COLUMNS)(
        jnp.asarray(queries),
        keys,
        values,
        jnp.asarray(table),
        jnp.int32(start),
        jnp.int32(length),
        *selected,
    )
    out, lse = np.asarray(out), np.asarray(lse)
    assert out.dtype == dtype
    assert lse.dtype == np.float32
    assert np.isfinite(out.astype(np.float32)).all()
    mask = None if mask is None else np.asarray(mask)
    expected, expected_lse = oracle.attention(queries, *flat, start, length, case.geometry, mask)
    seen = expected_lse[:length] > -np.inf
    assert (out[:length][~seen] == 0).all()
    assert (lse[:length][~seen] == -np.inf).all()
    if seen.any():
        assert_close(out[:length], expected[:length])
        assert_close(lse[:length][seen], expected_lse[:length][seen])


def selection(rng, case, end, columns, diagonals):
    """Columns and diagonals of each head; head 0 has columns alone."""
    selected = np.zeros((2, case.num_heads, 11 * case.page), bool)
    for head in range(case.num_heads):
        selected[0, head, rng.permutation(end)[:columns]] = True
        selected[1, head, rng.permutation(end)[: diagonals if head else 0]] = True
    return selected


@pytest.mark.parametrize("name", CASES)
def test_dense_attention_is_right_on_both_sides_of_a_chunk(name):
    case = CASES[name]
    end = 11 * case.page
    for start, length in ((0, 1), (0, 45), (47, 2), (end - 45, 45), (end - 50, 33)):
        check(case, "float32", start, length)


def test_dense_attention_is_right_in_bfloat16():
    for start, length in ((0, 30), (131, 45)):
        check(CASES["borders inside a tile"], "bfloat16", start, length)


# Parts of a plan's tile; blocks of several steps; blocks smaller than a product; one tile of all.
PLANS = {
    "tiles fit the chunk": Tiles(q=40, k=16),
    "borders inside a tile": Tiles(q=24, k=8),
    "chunks smaller than a tile": Tiles(q=64, k=16),
    "a page is no multiple of a tile": Tiles(q=16, k=12),
    "two kv heads of seven": Tiles(q=32, k=32),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_gives_dense_attention_under_its_mask(name):
    case = CASES[name]
    rng, end = np.random.default_rng(1), 11 * case.page
    for start, length, columns, diagonals in (
        (end - 45, 45, COLUMNS, 4),
        (0, 1, 1, 1),
        (end - 60, 45, 0, 9),
        (40, 2, 3, 0),
    ):
        selected = selection(rng, case, start + length, columns, diagonals)
        check(case, "float32", start, length, PLANS[name], selected)


def test_a_plan_is_right_in_bfloat16():
    case, tiles = CASES["tiles fit the chunk"], Tiles(q=32, k=16)
    selected = selection(np.random.default_rng(2), case, 170, COLUMNS, 3)
    check(case, "bfloat16", 130, 40, tiles, selected)
