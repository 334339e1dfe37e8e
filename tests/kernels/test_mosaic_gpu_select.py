"""The vote for Hopper in jax's interpreter: unread memory holds nan, and no two copies may meet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import sparse_oracle
from support.mosaic_gpu_interpreter import INTERPRET, interpreted  # noqa: F401
from support.tolerances import assert_close

from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.select import mosaic_gpu

pytestmark = pytest.mark.usefixtures("interpreted")
LAYER = 1
LIMIT = 2e-5  # votes are float32 sums of exponentials of logits up to 10
GEOMETRIES = {
    "one window": None,
    "pages fit the chunk": ChunkGeometry(160, 32),
    "pages straddle the chunk": ChunkGeometry(150, 37),
}


@functools.cache
def voter(geometry):
    return jax.jit(functools.partial(mosaic_gpu.vote, geometry=geometry, interpret=INTERPRET))


def check(start, length, geometry, *, N=2, K=1, R=20, H=128, page=128, pages=3):
    """Votes of one slice against the oracle; what lies after it, in its last page too, is nan."""
    rng = np.random.default_rng(start * 1000 + length)
    end, S = start + length, pages * page
    flat = rng.standard_normal((S, K, H)).astype(jnp.bfloat16)
    flat[end:] = np.nan
    used = -(-end // page)
    table = np.zeros(pages, np.int32)  # no keys lie there
    table[:used] = rng.permutation(np.arange(1, used + 1))
    cache = np.full((2, K, pages + 1, page, H), np.nan, flat.dtype)
    for number in range(used):
        cache[LAYER, :, table[number]] = flat[number * page : (number + 1) * page].swapaxes(0, 1)
    views = 1 if geometry is None else 3
    queries = (rng.standard_normal((views, R, N, H)) * 6 / H).astype(flat.dtype)
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
        assert_close(actual[:, :end], wanted, LIMIT)
        assert (np.asarray(actual)[:, end:] == 0).all()


def test_votes_equal_the_sums_of_softmax_across_tiles_and_a_border_of_chunks():
    for start, length in ((0, 7), (250, 20)):
        check(start, length, GEOMETRIES["pages straddle the chunk"])


# One token; a tile and one more or less; across a page; a full cache.
EDGES = ((0, 1), (3, 124), (64, 64), (0, 129), (250, 64), (200, 184))


@pytest.mark.long
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_votes_equal_the_sums_of_softmax_at_every_edge(geometry):
    for start, length in EDGES:
        check(start, length, geometry, R=64)


@pytest.mark.long
@pytest.mark.parametrize(("N", "K", "R", "H"), [(2, 2, 64, 64), (3, 1, 1, 128), (2, 1, 33, 128)])
def test_votes_of_any_heads_and_rows_over_pages_of_two_tiles(N, K, R, H):
    for start, length in ((0, 70), (300, 140)):
        shape = {"N": N, "K": K, "R": R, "H": H, "page": 256, "pages": 2}
        check(start, length, GEOMETRIES["pages straddle the chunk"], **shape)


def test_shapes_that_no_product_takes_are_refused():
    def refuse(*, match, R=64, H=128, page=128, of_queries="bfloat16", dtype="bfloat16"):
        queries = jax.ShapeDtypeStruct((1, R, 2, H), of_queries)
        keys = jax.ShapeDtypeStruct((1, 1, 4, page, H), dtype)
        table, scalar = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3,), ()))
        with pytest.raises(Unsupported, match=match):
            jax.eval_shape(
                lambda queries, keys, *rest: mosaic_gpu.vote(
                    queries, PagedKV(keys, keys), *rest, geometry=None
                ),
                *(queries, keys, scalar, table, scalar, scalar),
            )

    refuse(H=80, match="head_dim=80 must be one of 64, 128")
    refuse(page=64, match="page=64 must be a multiple of 128")
    refuse(R=65, match="R=65 rows must be at most 64")
    refuse(dtype="float32", of_queries="float32", match="one dtype of 16 bits")
    refuse(dtype="float16", match="queries are bfloat16, keys float16")
