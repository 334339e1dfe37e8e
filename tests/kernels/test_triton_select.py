"""The vote in Triton's interpreter: unread memory holds nan, as does what no kernel writes."""

from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
import pytest
from support import shards
from support.refusals import refused
from support.triton_interpreter import interpreted  # noqa: F401
from support.vote_cases import LAYER, AnySlice, slices

from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV

triton = pytest.importorskip("pallas_kernels.select.triton")
pytestmark = pytest.mark.usefixtures("interpreted")
GEOMETRIES = {
    "one window": None,
    "pages fit the chunk": ChunkGeometry(160, 32),
    "pages straddle the chunk": ChunkGeometry(150, 37),
    "chunks smaller than a tile": ChunkGeometry(33, 8),
}
STRADDLE = GEOMETRIES["pages straddle the chunk"]
# One token; fewer than the rows; a tile and one more or less; across a chunk; a full cache.
EDGES = ((0, 1), (0, 7), (40, 24), (3, 62), (0, 65), (250, 20), (223, 64), (300, 1), (0, 384))
PAGES = (128, 3), (12, 24), (40, 8), (100, 3), (192, 2)  # not all whole tiles
HEADS = (
    {"N": 2, "K": 2, "R": 64, "H": 128, "dtype": "bfloat16"},
    {"N": 7, "K": 1, "R": 16, "H": 16},
    {"N": 3, "K": 1, "R": 1, "H": 32, "dtype": "bfloat16"},
    {"N": 2, "K": 2, "R": 33, "H": 16},
)


class TestVote(AnySlice):
    function = staticmethod(triton.vote)
    voting = (
        *(slices(name, geometry, *EDGES) for name, geometry in GEOMETRIES.items()),
        *(
            slices(
                f"{pages} pages of {page}",
                STRADDLE,
                *((0, 1), (90, 60), (101, 180)),
                R=64,
                page=page,
                pages=pages,
            )
            for page, pages in PAGES
        ),
        *(
            slices(" ".join(map(str, each.values())), STRADDLE, (0, 70), (200, 140), **each)
            for each in HEADS
        ),
    )
    drawn = (pytest.param(list(GEOMETRIES.values()), id="all"),)
    drawn_shape = MappingProxyType({"R": 64})
    keys = 384


def test_a_slice_of_no_token_gives_no_vote():
    queries = np.full((1, 20, 2, 16), 1e3, np.float32)
    keys = np.full((2, 1, 3, 64, 16), np.nan, np.float32)
    table = jnp.array([1, 2], jnp.int32)
    for start in (0, 70):
        keys[LAYER, :, 1:].reshape(128, 16)[:start] = 1
        args = jnp.int32(LAYER), table, jnp.int32(start), jnp.int32(0)
        for sums in TestVote.compiled(None)(
            jnp.asarray(queries), PagedKV(*2 * [jnp.asarray(keys)]), *args
        ):
            assert (np.asarray(sums) == 0).all()


@pytest.mark.parametrize("geometry", shards.GEOMETRIES.values(), ids=shards.GEOMETRIES)
@pytest.mark.parametrize("part", [64, 40])
def test_votes_of_all_shards_are_those_of_the_whole(geometry, part):
    slices = (0, 1), (part, 6), (3 * part - 4, 13), (2 * part, 140)
    shards.Cut().vote(triton.vote, geometry, part=part, slices=slices, R=50)


def test_shapes_that_no_product_takes_are_refused():
    refused(triton.vote, "head_dim=80 must be one of 16, 32", head_dim=80)
    wide = {"head_dim": 256, "keys": "float32", "queries": "float32"}
    refused(triton.vote, "at most 512 bytes", **wide)
    refused(triton.vote, "R=65 rows must be at most 64", rows=(65,))
    refused(triton.vote, "queries are bfloat16, keys float32", keys="float32")
