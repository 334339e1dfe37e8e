"""The vote for TPU in the TPU interpreter, which raises on stale memory and stray reads."""

import functools
from types import MappingProxyType

import pytest
from support.mosaic_tpu_interpreter import INTERPRET, NOWHERE, Raceless
from support.refusals import refused
from support.vote_cases import AnySlice, slices

from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.select import mosaic_tpu

PAGE, PAGES = 256, 3
S = PAGE * PAGES
GEOMETRIES = {
    "one window": None,
    "tiles fit the chunk": ChunkGeometry(320, 64),
    "tiles straddle the chunk": ChunkGeometry(150, 37),
    "chunks smaller than a tile": ChunkGeometry(33, 8),
}
# One token; fewer than the rows; a tile and one more or less; across a chunk; a full cache.
EDGES = ((0, 1), (0, 7), (100, 28), (3, 126), (0, 129), (250, 20), (223, 64), (300, 1), (0, S))
HEADS = (
    {"N": 2, "K": 2, "R": 64, "dtype": "bfloat16"},
    {"N": 3, "K": 1, "R": 16},
    {"N": 5, "K": 1, "R": 1, "dtype": "bfloat16"},
    {"N": 1, "K": 1, "R": 128},
)


class TestVote(Raceless, AnySlice):
    function = staticmethod(mosaic_tpu.vote)
    options = MappingProxyType({"interpret": INTERPRET, "tile": 128})
    shape = MappingProxyType({"K": 2, "page": PAGE, "pages": PAGES})
    nowhere = NOWHERE
    voting = (
        *(slices(name, geometry, *EDGES) for name, geometry in GEOMETRIES.items()),
        *(
            slices(
                " ".join(map(str, heads.values())),
                GEOMETRIES["tiles straddle the chunk"],
                *((0, 70), (200, 140)),
                options={"tile": 256},
                **heads,
            )
            for heads in HEADS
        ),
    )
    drawn = tuple(pytest.param([each], id=name) for name, each in GEOMETRIES.items())
    keys = S


def test_shapes_that_do_not_fit_the_registers_are_refused():
    refuse = functools.partial(refused, mosaic_tpu.vote)
    refuse("head_dim=64 must be a multiple of 128", head_dim=64, page=PAGE)
    refuse("page=64 must be a multiple of 128", page=64)
    refuse("R=129 rows must be at most 128", rows=(129,), page=PAGE)
    refuse("queries are bfloat16, keys float32", keys="float32", page=PAGE)
