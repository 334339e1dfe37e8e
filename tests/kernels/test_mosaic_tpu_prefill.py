"""The TPU kernel of prefill in the TPU interpreter, which finds races and bad reads."""

import pytest
from support.mosaic_tpu_interpreter import INTERPRET, Raceless
from support.prefill_cases import AnySlice, Dense, Planned, of
from support.refusals import refused

from pallas_kernels.cases import Case
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.prefill import mosaic_tpu

OPTIONS = {"interpret": INTERPRET, "step": 128}
SMALL = Tiles(q=128, k=32)


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
# Queries times log2(e) are rounded to bfloat16 once more than those of other backends.
LIMIT = {"float32": 2e-6, "bfloat16": 2e-2}
ACROSS = (0, 1), (0, 150), (338, 70), (554, 150)
BESIDE = (127, 129), (255, 1), (256, 1), (500, 13), (554, 150)
LISTED = (554, 150, 150, 4), (0, 1, 3, 3), (511, 2, 0, 0)


class TestPrefill(Raceless, Dense, Planned, AnySlice):
    function = staticmethod(mosaic_tpu.prefill)
    options = OPTIONS
    cases = CASES
    columns = 150  # more than a step
    limits = lse_limits = LIMIT
    dense = (
        of("borders inside a tile", *ACROSS),
        of("borders inside a tile", *ACROSS, dtype="bfloat16"),
        of("one window", *BESIDE),
        of("tiles fit the chunk", *BESIDE),
    )
    planned = (
        of("one window", *LISTED, tiles=Tiles(q=64, k=32)),
        of("one window", *LISTED, tiles=Tiles(q=64, k=32), dtype="bfloat16"),
        # More tiles than a word has bits.
        of("two kv heads", (554, 150, 150, 5), tiles=Tiles(q=4, k=32), marks=pytest.mark.long),
    )
    drawn = (
        pytest.param([("chunks smaller than a tile", None), ("two kv heads", None)], id="dense"),
        pytest.param([("borders inside a tile", SMALL), ("two kv heads", SMALL)], id="planned"),
    )

    @classmethod
    def dense_options(cls, case):
        return {"tiles": Tiles(q=128 * case.num_heads // case.num_kv_heads, k=128)}


@pytest.mark.parametrize(
    ("tiles", "text"),
    [(Tiles(q=128, k=96), "96 keys"), (Tiles(q=128, k=128), "a TPU copies")],
)
def test_keys_that_are_not_whole_registers_are_refused(tiles, text):
    shape = {"rows": (8,), "head_dim": 16, "page": 4, "pages": 3}
    refused(mosaic_tpu.prefill, text, **shape, queries="float32", keys="float32", tiles=tiles)
