"""The Triton kernels of prefill in Triton's interpreter, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paged import LAYER
from support.prefill_cases import AnySlice, Dense, Planned, Sharded, of
from support.refusals import refused
from support.tolerances import assert_close

from pallas_kernels import plan as plans
from pallas_kernels.cases import Case
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


DRAWN = "tiles fit the chunk", "borders inside a tile"
LISTED = (0, 1, 1, 1), (40, 2, 3, 0)


class TestPrefill(Dense, Planned, AnySlice, Sharded):
    function = staticmethod(triton.prefill)
    options = OPTIONS
    cases = CASES
    columns = COLUMNS
    dense = (
        *(
            of(name, (0, 1), (47, 2), (11 * case.page - 45, 45), (11 * case.page - 50, 33))
            for name, case in CASES.items()
        ),
        of("tiles fit the chunk", (0, 30), (131, 45), dtype="bfloat16"),
    )
    planned = (
        *(
            of(
                name,
                (11 * CASES[name].page - 45, 45, COLUMNS, 4),
                (11 * CASES[name].page - 60, 45, 0, 9),
                *LISTED,
                tiles=tiles,
            )
            for name, tiles in PLANS.items()
        ),
        of(
            "tiles fit the chunk",
            *((0, 30, COLUMNS, 3), (131, 45, COLUMNS, 3)),
            dtype="bfloat16",
            tiles=Tiles(q=32, k=16),
        ),
    )
    drawn = tuple(
        pytest.param([(name, tiles.get(name)) for name in DRAWN], id=kind)
        for kind, tiles in (("dense", {}), ("planned", PLANS))
    )

    @pytest.mark.parametrize("name", ["tiles fit the chunk", "borders inside a tile"])
    def test_programs_that_share_out_the_keys_of_a_tile_agree(self, name, monkeypatch):
        monkeypatch.setattr(triton, "LEAST_STEPS", 1)
        case = CASES[name]
        for start, length in ((0, 1), (20, 45), (11 * case.page - 45, 45)):
            self.check(case, "float32", start, length, programs=30)

    def test_a_plan_of_everything_in_a_head_is_dense_and_that_of_nothing_is_empty(self):
        case, start, length = CASES["tiles fit the chunk"], 130, 45
        (*args, _, _), _ = self.inputs(case, "float32", start, length)
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

    def test_layers_of_a_scan_read_their_own_part_of_the_cache(self):
        case, start, length = CASES["one window"], 100, 45
        (queries, kv, _, *where), _ = self.inputs(case, "float32", start, length)
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
    ("text", "shape"),
    [
        ("heads of 24", {"head_dim": 24}),
        ("not of one type", {"keys": "bfloat16"}),
        ("32 bits", {"rows": (2**25,), "heads": 4}),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(text, shape):
    usual = {"rows": (8,), "head_dim": 16, "page": 16, "pages": 3}
    refused(triton.prefill, text, **usual | {"queries": "float32", "keys": "float32"} | shape)
