"""The Triton kernels of prefill in Triton's interpreter, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle
from support.tolerances import assert_close
from test_prefill_decode import LAYER, poison, random_inputs

from pallas_kernels import plan as plans
from pallas_kernels.cases import Case
from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV

pytest.importorskip("triton", reason="Triton (pip install triton) is not installed")
from support.triton_interpreter import interpreted  # noqa: F401

from pallas_kernels.prefill import triton

pytestmark = pytest.mark.usefixtures("interpreted", "few_at_once")
COLUMNS = 40
OPTIONS = {"tiles": Tiles(q=32, k=16), "step": 16, "programs": 3}


@pytest.fixture
def few_at_once(monkeypatch):
    """Lists are made of several pieces even here."""
    monkeypatch.setattr(triton, "LISTED", 16)


def case_of(**sizes):
    usual = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 16, "page": 16, "geometry": None}
    return Case(slice_len=45, **usual | sizes)


# Slices of several tiles, caches of 11 pages.
CASES = {
    "one window": case_of(),
    "tiles fit the chunk": case_of(geometry=ChunkGeometry(80, 32)),
    "borders inside a tile": case_of(geometry=ChunkGeometry(57, 10), num_heads=2),
    "chunks smaller than a tile": case_of(geometry=ChunkGeometry(11, 4), num_heads=1),
    "pages of no whole tiles": case_of(page=12, geometry=ChunkGeometry(56, 24)),
    "pages of two tiles": case_of(
        num_heads=4, num_kv_heads=2, page=32, geometry=ChunkGeometry(96, 32)
    ),
    "seven heads, wide": case_of(num_heads=7, head_dim=32),
}
# Of plans: parts of a tile; blocks smaller than a product, or of two steps; padding in one tile.
PLANS = {
    "one window": Tiles(q=48, k=16),
    "tiles fit the chunk": Tiles(q=40, k=16),
    "borders inside a tile": Tiles(q=24, k=8),
    "chunks smaller than a tile": Tiles(q=64, k=16),
    "pages of no whole tiles": Tiles(q=16, k=12),
    "pages of two tiles": Tiles(q=32, k=32),
}


@functools.cache
def compiled(case, tiles, **options):
    """The kernel, dense for tiles None, else by a plan of these tiles."""

    def run(queries, kv, layer, table, start, length, verticals, slashes):
        plan = mask = None
        if tiles is not None:
            plan = plans.build(
                verticals,
                slashes,
                start,
                length,
                num_queries=case.slice_len,
                num_columns=COLUMNS,
                tiles=tiles,
            )
            mask = plans.to_mask(plan, start, length, num_keys=verticals.shape[1])
        args = queries, kv, layer, table, start, length
        given = {"geometry": case.geometry, "plan": plan}
        return *triton.prefill(*args, **given, **OPTIONS | options), mask

    return jax.jit(run)


def inputs(case, dtype, start, length, selected=None, seed=0):
    rng, cache, flat, table = random_inputs(case, jnp.dtype(dtype), seed)
    views = 1 if case.geometry is None else 3
    shape = views, case.slice_len, case.num_heads, case.head_dim
    queries = rng.standard_normal(shape).astype(dtype)
    if selected is None:
        selected = np.zeros((2, case.num_heads, len(flat[0])), bool)
    where = jnp.int32(LAYER), jnp.asarray(table), jnp.int32(start), jnp.int32(length)
    return (
        jnp.asarray(queries),
        poison(cache, case, table, start + length),
        *where,
        *selected,
    ), flat


def check(case, dtype, start, length, tiles=None, selected=None, seed=0, **options):
    args, flat = inputs(case, dtype, start, length, selected, seed)
    out, lse, mask = compiled(case, tiles, **options)(*args)
    out, lse = np.asarray(out), np.asarray(lse)
    assert out.dtype == dtype
    assert lse.dtype == np.float32
    assert np.isfinite(out.astype(np.float32)).all()
    mask = None if mask is None else np.asarray(mask)
    expected, expected_lse = oracle.attention(args[0], *flat, start, length, case.geometry, mask)
    seen = expected_lse[:length] > -np.inf
    assert (out[:length][~seen] == 0).all()
    assert (lse[:length][~seen] == -np.inf).all()
    if seen.any():
        assert_close(out[:length], expected[:length])
        assert_close(lse[:length][seen], expected_lse[:length][seen])


def selection(rng, case, end, columns, diagonals):
    """Columns and diagonals of each head; head 0 has columns alone, if there is another."""
    selected = np.zeros((2, case.num_heads, 11 * case.page), bool)
    for head in range(case.num_heads):
        selected[0, head, rng.permutation(end)[:columns]] = True
        alone = head == 0 and case.num_heads > 1
        selected[1, head, rng.permutation(end)[: 0 if alone else diagonals]] = True
    return selected


@pytest.mark.parametrize("name", CASES)
def test_dense_attention_is_right_on_both_sides_of_a_chunk(name):
    case = CASES[name]
    end = 11 * case.page
    for start, length in ((0, 1), (47, 2), (end - 45, 45), (end - 50, 33)):
        check(case, "float32", start, length)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_gives_dense_attention_under_its_mask(name):
    case, tiles = CASES[name], PLANS[name]
    rng, end = np.random.default_rng(1), 11 * case.page
    for start, length, columns, diagonals in (
        (end - 45, 45, COLUMNS, 4),
        (0, 1, 1, 1),
        (end - 60, 45, 0, 9),
        (40, 2, 3, 0),
    ):
        selected = selection(rng, case, start + length, columns, diagonals)
        check(case, "float32", start, length, tiles, selected)


def test_attention_is_right_in_bfloat16():
    case = CASES["tiles fit the chunk"]
    for start, length in ((0, 30), (131, 45)):
        check(case, "bfloat16", start, length)
        selected = selection(np.random.default_rng(2), case, start + length, COLUMNS, 3)
        check(case, "bfloat16", start, length, Tiles(q=32, k=16), selected)


@pytest.mark.parametrize("name", ["tiles fit the chunk", "borders inside a tile"])
def test_programs_that_share_out_the_keys_of_a_tile_agree(name, monkeypatch):
    monkeypatch.setattr(triton, "LEAST_STEPS", 1)
    case = CASES[name]
    for start, length in ((0, 1), (20, 45), (11 * case.page - 45, 45)):
        check(case, "float32", start, length, programs=30)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_attention_is_right_for_every_slice(data):
    name = data.draw(st.sampled_from(["tiles fit the chunk", "borders inside a tile"]), "case")
    case = CASES[name]
    end = data.draw(st.integers(1, 11 * case.page), "end")
    length = data.draw(st.integers(1, min(end, case.slice_len)), "length")
    tiles = data.draw(st.sampled_from([None, PLANS[name]]), "tiles")
    columns = data.draw(st.sampled_from([0, 1, COLUMNS]), "columns")
    diagonals = data.draw(st.sampled_from([0, 1, 5, 704]), "diagonals")
    selected = selection(np.random.default_rng(end), case, end, columns, diagonals)
    check(case, "float32", end - length, length, tiles, selected, seed=end)


def test_a_plan_of_everything_in_a_head_is_dense_and_that_of_nothing_is_empty():
    case, start, length = CASES["tiles fit the chunk"], 130, 45
    (*args, _, _), _ = inputs(case, "float32", start, length)
    N, S = case.num_heads, 11 * case.page
    nothing = plans.build(
        *jnp.zeros((2, N, S), bool),
        jnp.int32(start),
        jnp.int32(length),
        num_queries=case.slice_len,
        num_columns=COLUMNS,
        tiles=Tiles(q=40, k=16),
    )
    heads = jnp.arange(N) % 2 == 0
    plan = plans.everything(nothing, heads, jnp.int32(start), jnp.int32(length))
    attend = jax.jit(functools.partial(triton.prefill, geometry=case.geometry, **OPTIONS))
    out, lse = attend(*args, plan=plan)
    dense, dense_lse = attend(*args)
    assert_close(out[:, heads], dense[:, heads])
    assert_close(lse[:, heads], dense_lse[:, heads])
    assert (np.asarray(out)[:, ~heads] == 0).all()
    assert (np.asarray(lse)[:, ~heads] == -np.inf).all()


def test_attention_of_all_shards_is_that_of_the_whole(monkeypatch):
    monkeypatch.setitem(test_shards.OPTIONS, "triton", OPTIONS)
    geometry = test_shards.GEOMETRIES["borders in and between parts"]
    first, *_, last = test_shards.SLICES
    test_shards.prefill("triton", geometry, (first, last))
    test_shards.prefill("triton", geometry, (first, last), test_shards.random_plan)


def test_layers_of_a_scan_read_their_own_part_of_the_cache():
    case, start, length = CASES["one window"], 100, 45
    (queries, kv, _, *where), _ = inputs(case, "float32", start, length)
    where = where[:3]

    @jax.jit
    def run(kv):
        def step(_, layer):
            return None, triton.prefill(queries, kv, layer, *where, geometry=None, **OPTIONS)

        return jax.lax.scan(step, None, jnp.arange(2))[1]

    out, lse = run(PagedKV(kv.keys.at[0].set(1), kv.values.at[0].set(2)))
    assert_close(out[0], np.full(out[0].shape, 2))
    expected, expected_lse = triton.prefill(
        queries, kv, jnp.int32(LAYER), *where, geometry=None, **OPTIONS
    )
    np.testing.assert_array_equal(out[1], expected)
    np.testing.assert_array_equal(lse[1], expected_lse)


@pytest.mark.parametrize(
    ("size", "queries", "cache", "text"),
    [
        ((8, 2, 24), "float32", "float32", "heads of 24"),
        ((8, 2, 16), "float32", "bfloat16", "not of one type"),
        ((2**25, 4, 16), "float32", "float32", "32 bits"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(size, queries, cache, text):
    T, N, H = size
    args = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, T, N, H), queries),
            ((1, 1, 3, 16, H), cache),
            ((1, 1, 3, 16, H), cache),
            ((), "int32"),
            ((3,), "int32"),
            ((), "int32"),
            ((), "int32"),
        )
    ]
    with pytest.raises(Unsupported, match=text):
        jax.eval_shape(
            lambda queries, keys, values, *rest: triton.prefill(
                queries, PagedKV(keys, values), *rest, geometry=None
            ),
            *args,
        )
