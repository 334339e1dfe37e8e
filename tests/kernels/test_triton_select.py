"""The vote in Triton's interpreter: unread memory holds nan, as does what no kernel writes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import sparse_oracle
from support.tolerances import assert_close
from support.triton_interpreter import interpreted  # noqa: F401

from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV

triton = pytest.importorskip("pallas_kernels.select.triton")
pytestmark = pytest.mark.usefixtures("interpreted")
LAYER = 1
GEOMETRIES = {
    "one window": None,
    "pages fit the chunk": ChunkGeometry(160, 32),
    "pages straddle the chunk": ChunkGeometry(150, 37),
    "chunks smaller than a tile": ChunkGeometry(33, 8),
}


@functools.cache
def voter(geometry):
    return jax.jit(functools.partial(triton.vote, geometry=geometry))


def check(start, length, geometry, *, N=2, K=1, R=20, H=16, page=64, pages=6, dtype="float32"):
    """Votes of one slice against the oracle; what lies after it, in its last page too, is nan."""
    rng = np.random.default_rng(start * 1000 + length)
    end, S = start + length, pages * page
    flat = rng.standard_normal((S, K, H)).astype(dtype)
    flat[end:] = np.nan
    used = -(-end // page)
    table = np.zeros(pages, np.int32)  # no keys lie there
    table[:used] = rng.permutation(np.arange(1, used + 1))
    cache = np.full((2, K, pages + 1, page, H), np.nan, flat.dtype)
    for number in range(used):
        cache[LAYER, :, table[number]] = flat[number * page : (number + 1) * page].swapaxes(0, 1)
    views = 1 if geometry is None else 3
    queries = (rng.standard_normal((views, R, N, H)) * 6 / H).astype(dtype)
    queries[:, : max(R - length, 0)] = 1e3  # rows before the slice do not vote
    sums = voter(geometry)(
        jnp.asarray(queries),
        PagedKV(*2 * [jnp.asarray(cache)]),
        jnp.int32(LAYER),
        jnp.asarray(table),
        jnp.int32(start),
        jnp.int32(length),
    )
    expected = sparse_oracle.votes(queries, flat, start, length, geometry)
    for actual, wanted in zip(sums, expected, strict=True):
        assert actual.shape == (N, S)
        assert actual.dtype == jnp.float32
        assert_close(actual[:, :end], wanted)
        assert (np.asarray(actual)[:, end:] == 0).all()


# One token; fewer than the rows; a tile and one more or less; across a chunk; a full cache.
EDGES = ((0, 1), (0, 7), (40, 24), (3, 62), (0, 65), (250, 20), (223, 64), (300, 1), (0, 384))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_votes_equal_the_sums_of_softmax_at_every_edge(geometry):
    for start, length in EDGES:
        check(start, length, geometry)


@pytest.mark.parametrize(
    ("page", "pages"), [(128, 3), (12, 24), (40, 8), (100, 3), (192, 2)], ids=str
)
def test_pages_need_not_be_whole_tiles(page, pages):
    for start, length in ((0, 1), (90, 60), (101, 180)):
        check(start, length, GEOMETRIES["pages straddle the chunk"], page=page, pages=pages, R=64)


@pytest.mark.parametrize(
    ("N", "K", "R", "H", "dtype"),
    [
        (2, 2, 64, 128, "bfloat16"),
        (7, 1, 16, 16, "float32"),
        (3, 1, 1, 32, "bfloat16"),
        (2, 2, 33, 16, "float32"),
    ],
)
def test_votes_of_any_heads_rows_and_dtypes(N, K, R, H, dtype):
    geometry = GEOMETRIES["pages straddle the chunk"]
    for start, length in ((0, 70), (200, 140)):
        check(start, length, geometry, N=N, K=K, R=R, H=H, dtype=jnp.dtype(dtype))


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_votes_equal_the_sums_of_softmax_of_any_slice(data):
    geometry = data.draw(st.sampled_from(list(GEOMETRIES.values())))
    start = data.draw(st.integers(0, 383), "start")
    check(start, data.draw(st.integers(1, 384 - start), "length"), geometry, R=64)


def test_a_slice_of_no_token_gives_no_vote():
    queries = np.full((1, 20, 2, 16), 1e3, np.float32)
    keys = np.full((2, 1, 3, 64, 16), np.nan, np.float32)
    table = jnp.array([1, 2], jnp.int32)
    for start in (0, 70):
        keys[LAYER, :, 1:].reshape(128, 16)[:start] = 1
        args = jnp.int32(LAYER), table, jnp.int32(start), jnp.int32(0)
        for sums in voter(None)(jnp.asarray(queries), PagedKV(*2 * [jnp.asarray(keys)]), *args):
            assert (np.asarray(sums) == 0).all()


@pytest.mark.parametrize("geometry", test_shards.GEOMETRIES.values(), ids=test_shards.GEOMETRIES)
@pytest.mark.parametrize("part", [64, 40])
def test_votes_of_all_shards_are_those_of_the_whole(geometry, part, monkeypatch):
    monkeypatch.setitem(test_shards.OPTIONS, "triton", {})
    slices = (0, 1), (part, 6), (3 * part - 4, 13), (2 * part, 140)
    test_shards.vote("triton", geometry, part=part, count=3, slices=slices, R=50)


def test_shapes_that_no_product_takes_are_refused():
    def refuse(*, R=64, H=128, of_queries="bfloat16", dtype="bfloat16", match):
        queries = jax.ShapeDtypeStruct((1, R, 2, H), of_queries)
        keys = jax.ShapeDtypeStruct((1, 1, 4, 64, H), dtype)
        table, scalar = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3,), ()))
        with pytest.raises(Unsupported, match=match):
            jax.eval_shape(
                lambda queries, keys, *rest: triton.vote(
                    queries, PagedKV(keys, keys), *rest, geometry=None
                ),
                *(queries, keys, scalar, table, scalar, scalar),
            )

    refuse(H=80, match="head_dim=80 must be one of 16, 32")
    refuse(H=256, dtype="float32", of_queries="float32", match="at most 512 bytes")
    refuse(R=65, match="R=65 rows must be at most 64")
    refuse(dtype="float32", match="queries are bfloat16, keys float32")
