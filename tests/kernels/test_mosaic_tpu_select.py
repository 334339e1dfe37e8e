"""The vote for TPU in the TPU interpreter, which raises on stale memory and stray reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from support import sparse_oracle
from support.tolerances import assert_close

from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.select import mosaic_tpu

LAYER, NOWHERE = 1, 2**30
PAGE, PAGES = 256, 3
S = PAGE * PAGES
INTERPRET = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)
GEOMETRIES = {
    "one window": None,
    "tiles fit the chunk": ChunkGeometry(320, 64),
    "tiles straddle the chunk": ChunkGeometry(150, 37),
    "chunks smaller than a tile": ChunkGeometry(33, 8),
}


@functools.cache
def voter(geometry, tile):
    return jax.jit(
        functools.partial(mosaic_tpu.vote, geometry=geometry, tile=tile, interpret=INTERPRET)
    )


def check(start, length, geometry, *, N=2, K=2, R=20, H=16, dtype="float32", tile=128, limit=None):
    """Votes of one slice against the oracle; what lies after it, in its last page too, is nan."""
    rng = np.random.default_rng(start * S + length)
    end = start + length
    flat = rng.standard_normal((S, K, H)).astype(dtype)
    flat[end:] = np.nan
    used = -(-end // PAGE)
    table = np.full(PAGES, NOWHERE, np.int32)  # to read a page that is not there is an error
    table[:used] = rng.permutation(np.arange(1, used + 1))
    cache = np.full((2, K, PAGES + 1, PAGE, H), np.nan, flat.dtype)
    for page in range(used):
        cache[LAYER, :, table[page]] = flat[page * PAGE : (page + 1) * PAGE].swapaxes(0, 1)
    views = 1 if geometry is None else 3
    queries = (rng.standard_normal((views, R, N, H)) * 6 / H).astype(dtype)
    queries[:, : max(R - length, 0)] = 1e3  # rows before the slice do not vote
    sums = voter(geometry, tile)(
        jnp.asarray(queries),
        PagedKV(*2 * [jnp.asarray(cache)]),
        jnp.int32(LAYER),
        jnp.asarray(table),
        jnp.int32(start),
        jnp.int32(length),
    )
    assert not interpret_pallas_call.races.races_found
    expected = sparse_oracle.votes(queries, flat, start, length, geometry)
    for actual, wanted in zip(sums, expected, strict=True):
        assert actual.dtype == jnp.float32
        assert_close(actual[:, :end], wanted, limit)
        assert (np.asarray(actual)[:, end:] == 0).all()


# One token; fewer than the rows; a tile and one more or less; across a chunk; a full cache.
EDGES = ((0, 1), (0, 7), (100, 28), (3, 126), (0, 129), (250, 20), (223, 64), (300, 1), (0, S))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_votes_equal_the_sums_of_softmax_at_every_edge(geometry):
    for start, length in EDGES:
        check(start, length, geometry)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_votes_equal_the_sums_of_softmax_of_any_slice(geometry, data):
    start = data.draw(st.integers(0, S - 1), "start")
    check(start, data.draw(st.integers(1, S - start), "length"), geometry)


@pytest.mark.parametrize(
    ("N", "K", "R", "dtype"),
    [(2, 2, 64, "bfloat16"), (3, 1, 16, "float32"), (5, 1, 1, "bfloat16"), (1, 1, 128, "float32")],
)
def test_votes_of_any_heads_rows_and_dtypes(N, K, R, dtype):
    geometry = GEOMETRIES["tiles straddle the chunk"]
    for start, length in ((0, 70), (200, 140)):
        check(start, length, geometry, N=N, K=K, R=R, dtype=jnp.dtype(dtype), tile=256)


def test_shapes_that_do_not_fit_the_registers_are_refused():
    def refuse(*, page=PAGE, R=64, H=128, dtype="bfloat16", match):
        queries = jax.ShapeDtypeStruct((1, R, 2, H), "bfloat16")
        keys = jax.ShapeDtypeStruct((1, 1, 4, page, H), dtype)
        table, scalar = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3,), ()))
        with pytest.raises(Unsupported, match=match):
            jax.eval_shape(
                lambda queries, keys, *rest: mosaic_tpu.vote(
                    queries, PagedKV(keys, keys), *rest, geometry=None
                ),
                *(queries, keys, scalar, table, scalar, scalar),
            )

    refuse(H=64, match="head_dim=64 must be a multiple of 128")
    refuse(page=64, match="page=64 must be a multiple of 128")
    refuse(R=129, match="R=129 rows must be at most 128")
    refuse(dtype="float32", match="queries are bfloat16, keys float32")
