"""The vote for Hopper in jax's interpreter: unread memory holds nan, and no two copies may meet."""

import functools
from types import MappingProxyType

import pytest
from support.mosaic_gpu_interpreter import INTERPRET, interpreted  # noqa: F401
from support.refusals import refused
from support.vote_cases import Vote, slices

from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.select import mosaic_gpu

pytestmark = pytest.mark.usefixtures("interpreted")
GEOMETRIES = {
    "one window": None,
    "pages fit the chunk": ChunkGeometry(160, 32),
    "pages straddle the chunk": ChunkGeometry(150, 37),
}
STRADDLE = GEOMETRIES["pages straddle the chunk"]
# One token; a tile and one more or less; across a page; a full cache.
EDGES = ((0, 1), (3, 124), (64, 64), (0, 129), (250, 64), (200, 184))
HEADS = (2, 2, 64, 64), (3, 1, 1, 128), (2, 1, 33, 128)


class TestVote(Vote):
    function = staticmethod(mosaic_gpu.vote)
    options = MappingProxyType({"interpret": INTERPRET})
    shape = MappingProxyType({"H": 128, "page": 128, "pages": 3, "dtype": "bfloat16"})
    limit = 2e-5  # votes are float32 sums of exponentials of logits up to 10
    voting = (
        slices("across tiles and a border of chunks", STRADDLE, (0, 7), (250, 20)),
        *(
            slices(name, geometry, *EDGES, R=64, marks=pytest.mark.long)
            for name, geometry in GEOMETRIES.items()
        ),
        *(
            slices(
                f"pages of two tiles, {N} {K} {R} {H}",
                STRADDLE,
                *((0, 70), (300, 140)),
                marks=pytest.mark.long,
                N=N,
                K=K,
                R=R,
                H=H,
                page=256,
                pages=2,
            )
            for N, K, R, H in HEADS
        ),
    )


def test_shapes_that_no_product_takes_are_refused():
    refuse = functools.partial(refused, mosaic_gpu.vote)
    refuse("head_dim=80 must be one of 64, 128", head_dim=80, page=128)
    refuse("page=64 must be a multiple of 128", page=64)
    refuse("R=65 rows must be at most 64", rows=(65,), page=128)
    refuse("one dtype of 16 bits", keys="float32", queries="float32", page=128)
    refuse("queries are bfloat16, keys float16", keys="float16", page=128)
