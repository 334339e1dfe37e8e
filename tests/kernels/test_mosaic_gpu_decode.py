"""Decode for Hopper in jax's interpreter: unread memory holds nan, and no two copies may meet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import sequences
from support.mosaic_gpu_interpreter import INTERPRET, interpreted  # noqa: F401
from support.sequences import after
from test_shards import merged

from pallas_kernels.decode import mosaic_gpu
from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.shard import Shard

pytestmark = pytest.mark.usefixtures("interpreted")


class Sequences(sequences.Sequences):
    function = staticmethod(functools.partial(mosaic_gpu.decode, interpret=INTERPRET))

    def __init__(self, rows, geometry, **shape):
        super().__init__(rows, geometry, **{"H": 128, "page": 64, "dtype": "bfloat16"} | shape)


def test_lengths_around_tiles_and_pages_and_idle_rows_match_the_oracle():
    rows = [after(0), [], after(62), after(63), [], after(64), after(127, 3), []]
    Sequences(rows, ChunkGeometry(chunk_size=90, local_size=20)).check(blocks=3)


def test_one_to_eight_tokens_across_a_border_of_chunks_match_the_oracle():
    geometry = ChunkGeometry(chunk_size=108, local_size=8)
    Sequences([after(299 - n // 2, n) for n in (1, 4, 8)], geometry, page=128).check(blocks=2)


def test_more_rows_than_one_product_has():
    Sequences([after(187, 10)], ChunkGeometry(40, 8), G=7).check(blocks=2)


@pytest.mark.parametrize(
    "blocks", [4, *(pytest.param(blocks, marks=pytest.mark.long) for blocks in (1, 40))]
)
def test_runs_of_any_number_and_length_add_up(blocks):
    rows = [after(3), after(700), [], after(77, 2), after(170)]
    Sequences(rows, ChunkGeometry(200, 56), K=2, G=7).check(blocks=blocks)


def test_a_batch_of_one_window_without_a_token_is_empty():
    batch = Sequences([after(5)] * 2, None)
    batch.positions[:] = -1
    out, lse = batch.decode(blocks=2)
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()


@pytest.mark.long
@pytest.mark.parametrize("geometry", [None, ChunkGeometry(420, 84), ChunkGeometry(100, 20)])
def test_all_shards_merge_to_the_whole(geometry):
    rows = [after(0), [], after(30, 4), after(190), after(306, 3)]
    batch = Sequences(rows, geometry, page=192)
    found = [batch.decode(Shard(jnp.int32(i), 64, 3), blocks=2) for i in range(3)]
    out, lse = merged(found)
    batch.assert_expected(out.astype(batch.cache.dtype), lse)


@pytest.mark.long
@settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_random_batches_of_random_geometries_match_the_oracle(data):
    shape = {
        "G": data.draw(st.integers(1, 7)),
        "K": data.draw(st.integers(1, 2)),
        "page": data.draw(st.sampled_from([64, 128, 192])),
    }
    sizes = st.integers(2, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))
    geometry = data.draw(st.one_of(st.none(), st.builds(lambda n: ChunkGeometry(*n), sizes)))
    row = st.builds(after, st.integers(0, 400), st.integers(0, 4))
    rows = data.draw(st.lists(row, min_size=1, max_size=3).filter(any))
    batch = Sequences(rows, geometry, seed=data.draw(st.integers(0, 99)), **shape)
    batch.check(blocks=data.draw(st.integers(1, 5)), stages=data.draw(st.sampled_from([2, 4])))


def test_what_no_product_takes_is_refused():
    def refuse(*, match, H=128, page=64, dtype="bfloat16", of_queries="bfloat16"):
        cache = jax.ShapeDtypeStruct((1, 1, 4, page, H), dtype)
        queries = jax.ShapeDtypeStruct((1, 1, 1, 2, H), of_queries)
        layer, *rest = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (1, 3), (1, 1)))
        with pytest.raises(Unsupported, match=match):
            jax.eval_shape(
                lambda queries, keys, *rest: mosaic_gpu.decode(
                    queries, PagedKV(keys, keys), *rest, geometry=None
                ),
                *(queries, cache, layer, *rest),
            )

    refuse(H=64, match="head_dim=64 must be 128")
    refuse(page=96, match="page=96 must be a multiple of 64")
    refuse(dtype="float32", of_queries="float32", match="one dtype of 16 bits")
    refuse(of_queries="float16", match="queries are float16, keys bfloat16")
