"""Decode for Hopper in jax's interpreter: unread memory holds nan, and no two copies may meet."""

import functools
from types import MappingProxyType

import pytest
from hypothesis import strategies as st
from support import sequences
from support.decode_cases import AnyBatch, Sharded, batch
from support.mosaic_gpu_interpreter import INTERPRET, interpreted  # noqa: F401
from support.refusals import BATCH, refused
from support.sequences import after

from pallas_kernels.decode import mosaic_gpu
from pallas_kernels.geometry import ChunkGeometry

pytestmark = pytest.mark.usefixtures("interpreted")


class Sequences(sequences.Sequences):
    function = staticmethod(functools.partial(mosaic_gpu.decode, interpret=INTERPRET))
    shape = MappingProxyType({"H": 128, "page": 64, "dtype": "bfloat16"})


RUNS = [after(3), after(700), [], after(77, 2), after(170)]


def runs(blocks, *marks):
    shape = {"K": 2, "G": 7, "options": {"blocks": blocks}}
    return batch(f"{blocks} blocks", RUNS, ChunkGeometry(200, 56), marks=marks, **shape)


class TestDecode(AnyBatch, Sharded):
    sequences = Sequences
    usual = MappingProxyType({"blocks": 2})
    batches = (
        batch(
            "lengths around tiles and pages, and idle rows",
            [after(0), [], after(62), after(63), [], after(64), after(127, 3), []],
            ChunkGeometry(chunk_size=90, local_size=20),
            options={"blocks": 3},
        ),
        batch(
            "one to eight tokens across a border of chunks",
            [after(299 - n // 2, n) for n in (1, 4, 8)],
            ChunkGeometry(chunk_size=108, local_size=8),
            page=128,
        ),
        batch("more rows than one product has", [after(187, 10)], ChunkGeometry(40, 8), G=7),
        *(runs(4), runs(1, pytest.mark.long), runs(40, pytest.mark.long)),
    )
    cuts = (None, ChunkGeometry(420, 84), ChunkGeometry(100, 20))
    cut_rows = (after(0), [], after(30, 4), after(190), after(306, 3))
    part = 64
    drawn = MappingProxyType({"page": st.sampled_from([64, 128, 192])})
    drawn_options = MappingProxyType(
        {"blocks": st.integers(1, 5), "stages": st.sampled_from([2, 4])}
    )
    most = 400, 4, 3

    @pytest.mark.long
    def test_random_batches_of_random_geometries_match_the_oracle(self):
        super().test_random_batches_of_random_geometries_match_the_oracle()

    @pytest.mark.long
    def test_all_shards_merge_to_the_whole(self, cut):
        super().test_all_shards_merge_to_the_whole(cut)


def test_what_no_product_takes_is_refused():
    refuse = functools.partial(refused, mosaic_gpu.decode, rows=(1, 1), where=BATCH)
    refuse("head_dim=64 must be 128", head_dim=64)
    refuse("page=96 must be a multiple of 64", page=96)
    refuse("one dtype of 16 bits", keys="float32", queries="float32")
    refuse("queries are float16, keys bfloat16", queries="float16")
