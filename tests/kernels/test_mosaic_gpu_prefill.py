"""The Hopper kernel of prefill in the Mosaic GPU interpreter, which finds races, against float64.

The interpreter takes seconds for a few steps, so most of this is `long`. It has no tensor cores:
products are those of XLA, copies and barriers are the kernel's.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from support import shards
from support.prefill_cases import Dense, Planned, Sharded, of
from support.refusals import refused

from pallas_kernels import plan as plans
from pallas_kernels.cases import Case
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.mosaic_gpu import call
from pallas_kernels.prefill import mosaic_gpu
from pallas_kernels.prefill.mosaic_gpu_block import COLUMNS as COLUMN_STEPS
from pallas_kernels.prefill.mosaic_gpu_block import ENDS, FIRST, HEAD, ROW
from pallas_kernels.shard import WHOLE

INTERPRET = call.interpreter(detect_races=True, uninitialized_memory="nan")
OPTIONS = {"interpret": INTERPRET, "blocks": 2}
COLUMNS = 80  # more than a step


def case_of(**sizes):
    usual = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "page": 64, "geometry": None}
    return Case(**{"slice_len": 45} | usual | sizes)


# Caches of 11 pages: 704 keys, in steps of a page at most.
CASES = {
    "one window": case_of(num_heads=1),
    "tiles fit the chunk": case_of(geometry=ChunkGeometry(320, 64)),
    "borders inside a tile": case_of(geometry=ChunkGeometry(230, 61), slice_len=140, num_heads=1),
    "chunks smaller than a tile": case_of(geometry=ChunkGeometry(50, 10), num_heads=1),
    "two kv heads, wide": case_of(
        num_heads=4, num_kv_heads=2, head_dim=128, geometry=ChunkGeometry(320, 64)
    ),
    "steps of a part of a page": case_of(page=192, num_heads=1, slice_len=30),
}
# Of plans: padding in each item, several items a tile, several tiles, steps of a part of a block.
PLANS = {
    "one window": Tiles(q=40, k=32),
    "tiles fit the chunk": Tiles(q=45, k=64),
    "borders inside a tile": Tiles(q=128, k=64),
    "chunks smaller than a tile": Tiles(q=16, k=16),
    "two kv heads, wide": Tiles(q=150, k=32),
    "steps of a part of a page": Tiles(q=30, k=192),
}


def last(case):
    """The whole last slice of the cache, and one that ends before padding and before it."""
    end, T = 11 * case.page, case.slice_len
    return (end - T, T), (end - T - 9, T - 12)


def listed(case):
    end = 11 * case.page
    return (end - case.slice_len, case.slice_len, COLUMNS, 4), (end - 150, 30, 0, 9)


class TestPrefill(Dense, Planned, Sharded):
    function = staticmethod(mosaic_gpu.prefill)
    options = OPTIONS
    cases = CASES
    columns = COLUMNS
    scaled = True
    dense = (
        of("tiles fit the chunk", (704 - 45, 45), dtype="bfloat16"),
        of("one window", (0, 1), dtype="bfloat16"),
        *(
            of(name, (0, 1), (250, 15), *last(case), dtype="bfloat16", marks=pytest.mark.long)
            for name, case in CASES.items()
        ),
    )
    planned = (
        of(
            "tiles fit the chunk",
            (704 - 64, 45, COLUMNS, 3),
            dtype="bfloat16",
            tiles=PLANS["tiles fit the chunk"],
        ),
        *(
            of(
                name,
                *listed(case),
                *((0, 1, 1, 1), (40, 2, 3, 0)),
                dtype="bfloat16",
                tiles=PLANS[name],
                marks=pytest.mark.long,
            )
            for name, case in CASES.items()
        ),
    )
    sharded = shards.Cut(head_dim=64, dtype="bfloat16")

    def done(self):
        assert not interpret_pallas_call.get_races().races_found

    @pytest.mark.long
    def test_attention_of_all_shards_is_that_of_the_whole(self):
        super().test_attention_of_all_shards_is_that_of_the_whole()


@pytest.mark.parametrize("tiles", [None, Tiles(q=200, k=64)])
def test_items_are_all_tiles_of_all_heads_once_the_longest_first(tiles):
    T, N, S, start, length = 600, 3, 1024, 300, 520
    plan = None
    if tiles is not None:
        selected = np.random.default_rng(0).random((2, N, S)) < [[[0.02]], [[0.003]]]
        plan = plans.build(
            *jnp.asarray(selected),
            jnp.int32(start),
            jnp.int32(length),
            num_queries=T,
            num_columns=COLUMNS,
            tiles=tiles,
        )
    tile = 128 if tiles is None else tiles.q
    first = jnp.arange(-(-T // tile))[:, None] * tile + jnp.arange(0, tile, 128)
    numbers = jnp.int32(start), jnp.int32(length)
    geometry = ChunkGeometry(320, 64)
    table = mosaic_gpu.item_table(first, tile, 1, *numbers, 64, geometry, WHOLE, plan, N)
    table = np.asarray(table)
    places = {(head, row) for head, row in table[:, [HEAD, ROW]]}
    assert places == {(n, 128 * i) for n in range(N) for i in range(first.size)}
    assert len(table) == len(places)
    assert (np.diff(table[:, ENDS:], axis=1) >= 0).all()
    steps = table[:, -1] + table[:, COLUMN_STEPS]
    assert (np.diff(steps * mosaic_gpu.EVEN // steps.max()) <= 0).all()
    assert (steps[table[:, FIRST] >= length] == 0).all()


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("heads of 96 are none of 64, 128", {"head_dim": 96}),
        ("queries of float32, keys of bfloat16", {"queries": "float32"}),
        ("values of float16: not all bfloat16", {"values": "float16"}),
        ("blocks of 24 keys in pages of 24: not whole steps of 64", {"page": 24}),
        ("2147483648 rows: more than 32 bits count", {"page": 2**20, "pages": 2**11}),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(text, shape):
    refused(mosaic_gpu.prefill, text, **{"rows": (40,), "head_dim": 64, "pages": 3} | shape)
