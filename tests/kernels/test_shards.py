"""Kernels on shards of a cache: their results, merged, are those of the whole in float64."""

import functools

import pytest
from jax.experimental.pallas import tpu as pltpu
from support.shards import GEOMETRIES, PART, SLICES, Cut, K, N, S, T, random_plan

from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.tiles import Tiles

INTERPRET = {
    "interpret": pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
}
CUT = Cut()
TPU = {
    "prefill": {"tiles": Tiles(q=128 * N, k=128), "step": 128},
    "decode": {"block_bytes": 128 * K * CUT.head_dim * 4},
    "select": {"tile": 128},
}
each_backend = pytest.mark.parametrize("name", ["mosaic_tpu", "xla", "reference"])
SOON = ("borders in and between parts",)
each_geometry = pytest.mark.parametrize(
    "geometry",
    [
        pytest.param(geometry, id=name, marks=() if name in SOON else pytest.mark.long)
        for name, geometry in GEOMETRIES.items()
    ],
)


def function(operation, name):
    implementation = getattr(backend.load(operation, name), backend.FUNCTIONS[operation])
    options = INTERPRET | TPU[operation] if name == "mosaic_tpu" else {}
    return functools.partial(implementation, **options)


@each_backend
@each_geometry
def test_dense_prefill_of_all_shards_is_that_of_the_whole(name, geometry):
    CUT.prefill(function("prefill", name), geometry, SLICES)


@each_backend
@each_geometry
def test_prefill_by_plans_of_all_shards_is_that_by_their_sum(name, geometry):
    slices = (PART - 2, 1), (S - T - 9, T)
    CUT.prefill(function("prefill", name), geometry, slices, random_plan)


@each_backend
@each_geometry
def test_decode_of_all_shards_is_that_of_the_whole(name, geometry):
    CUT.decode(function("decode", name), geometry)


@each_backend
@each_geometry
def test_votes_of_all_shards_are_those_of_the_whole(name, geometry):
    slices = (0, 1), (125, 6), (380, 13), (500, 140)
    CUT.vote(function("select", name), geometry, part=128, slices=slices)
