"""The TPU kernel of prefill in the TPU interpreter, which finds races and bad reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from support import oracle
from support.tolerances import assert_close
from test_prefill_decode import LAYER, poison, random_inputs

from pallas_kernels import plan as plans
from pallas_kernels.cases import Case
from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.prefill import mosaic_tpu

INTERPRET = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)
# Queries times log2(e) are rounded to bfloat16 once more than those of other backends.
LIMIT = {"float32": 2e-6, "bfloat16": 2e-2}
COLUMNS = 150  # more than a step


def case_of(**sizes):
    usual = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "page": 64, "geometry": None}
    return Case(slice_len=150, **usual | sizes)


# Slices of two tiles, caches of 11 pages: 704 keys, of several steps each.
CASES = {
    "one window": case_of(),
    "tiles fit the chunk": case_of(geometry=ChunkGeometry(320, 64), num_heads=3),
    "borders inside a tile": case_of(geometry=ChunkGeometry(230, 61)),
    "chunks smaller than a tile": case_of(geometry=ChunkGeometry(50, 10), head_dim=8),
    "two kv heads": case_of(num_heads=4, num_kv_heads=2, geometry=ChunkGeometry(320, 64)),
}


@functools.cache
def compiled(case, tiles):
    """The kernel, dense for tiles None, else by a plan of these tiles."""

    def run(queries, kv, table, start, length, verticals, slashes):
        args = queries, kv, jnp.int32(LAYER), table, start, length
        options = {"geometry": case.geometry, "interpret": INTERPRET}
        if tiles is None:
            dense = Tiles(q=128 * case.num_heads // case.num_kv_heads, k=128)
            return *mosaic_tpu.prefill(*args, **options, tiles=dense), None
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
        return *mosaic_tpu.prefill(*args, **options, plan=plan, step=128), mask

    return jax.jit(run)


def check(case, dtype, start, length, tiles=None, selected=None, seed=0):
    rng, cache, flat, table = random_inputs(case, jnp.dtype(dtype), seed)
    S, N = len(flat[0]), case.num_heads
    views = 1 if case.geometry is None else 3
    queries = rng.standard_normal((views, case.slice_len, N, case.head_dim)).astype(dtype)
    kv = poison(cache, case, table, start + length)
    if selected is None:
        selected = np.zeros((2, N, S), bool)
    out, lse, mask = compiled(case, tiles)(
        jnp.asarray(queries),
        kv,
        jnp.asarray(table),
        jnp.int32(start),
        jnp.int32(length),
        *selected,
    )
    out, lse = np.asarray(out), np.asarray(lse)
    assert not interpret_pallas_call.races.races_found
    assert out.dtype == dtype
    assert lse.dtype == np.float32
    assert np.isfinite(out.astype(np.float32)).all()
    mask = None if mask is None else np.asarray(mask)
    expected, expected_lse = oracle.attention(queries, *flat, start, length, case.geometry, mask)
    seen = expected_lse[:length] > -np.inf
    assert (out[:length][~seen] == 0).all()
    assert (lse[:length][~seen] == -np.inf).all()
    if seen.any():
        assert_close(out[:length], expected[:length], LIMIT[dtype])
        assert_close(lse[:length][seen], expected_lse[:length][seen], LIMIT[dtype])


def selection(rng, case, end, columns, diagonals):
    """Columns and diagonals of each head; head 0 has columns alone."""
    selected = np.zeros((2, case.num_heads, 11 * case.page), bool)
    for head in range(case.num_heads):
        selected[0, head, rng.permutation(end)[:columns]] = True
        selected[1, head, rng.permutation(end)[: diagonals if head else 0]] = True
    return selected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_attention_across_borders_of_chunks_is_right_in_both_types(dtype):
    case = CASES["borders inside a tile"]
    for start, length in ((0, 1), (0, 150), (338, 70), (554, 150)):
        check(case, dtype, start, length)


@pytest.mark.parametrize("name", ["one window", "tiles fit the chunk"])
def test_dense_attention_is_right_on_both_sides_of_a_chunk(name):
    case = CASES[name]
    for start, length in ((127, 129), (255, 1), (256, 1), (500, 13), (554, 150)):
        check(case, "float32", start, length)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_gives_dense_attention_under_its_mask_in_both_types(dtype):
    case, tiles = CASES["one window"], Tiles(q=64, k=32)
    rng = np.random.default_rng(1)
    for start, length, columns, diagonals in ((554, 150, 150, 4), (0, 1, 3, 3), (511, 2, 0, 0)):
        selected = selection(rng, case, start + length, columns, diagonals)
        check(case, dtype, start, length, tiles, selected)


@pytest.mark.long
def test_a_plan_of_more_tiles_than_a_word_has_bits_is_right():
    case, tiles = CASES["two kv heads"], Tiles(q=4, k=32)
    selected = selection(np.random.default_rng(2), case, 704, COLUMNS, 5)
    check(case, "float32", 554, 150, tiles, selected)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_dense_attention_is_right_for_every_slice(data):
    case = CASES[data.draw(st.sampled_from(["chunks smaller than a tile", "two kv heads"]), "case")]
    end = data.draw(st.integers(1, 11 * case.page), "end")
    length = data.draw(st.integers(1, min(end, case.slice_len)), "length")
    check(case, "float32", end - length, length, seed=end)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_plan_is_right_for_every_slice(data):
    case = CASES[data.draw(st.sampled_from(["borders inside a tile", "two kv heads"]), "case")]
    tiles = Tiles(q=128, k=32)
    end = data.draw(st.integers(1, 11 * case.page), "end")
    length = data.draw(st.integers(1, min(end, case.slice_len)), "length")
    columns = data.draw(st.sampled_from([0, 1, COLUMNS]), "columns")
    diagonals = data.draw(st.sampled_from([0, 1, 5, 704]), "diagonals")
    selected = selection(np.random.default_rng(end), case, end, columns, diagonals)
    check(case, "float32", end - length, length, tiles, selected, seed=end)


@pytest.mark.parametrize(
    ("tiles", "text"),
    [(Tiles(q=128, k=96), "96 keys"), (Tiles(q=128, k=128), "a TPU copies")],
)
def test_keys_that_are_not_whole_registers_are_refused(tiles, text):
    case = CASES["one window"]
    queries = jnp.zeros((1, 8, 2, 16))
    cache = jnp.zeros((1, 1, 3, 4, 16))
    zero = jnp.int32(0)
    with pytest.raises(Unsupported, match=text):
        mosaic_tpu.prefill(
            queries,
            PagedKV(cache, cache),
            zero,
            jnp.arange(3),
            zero,
            zero,
            geometry=case.geometry,
            tiles=tiles,
        )
