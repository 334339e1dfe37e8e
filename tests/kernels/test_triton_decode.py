"""Decode in Triton's interpreter: unread memory holds nan, as does what no kernel writes."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import sequences
from support.sequences import after
from support.triton_interpreter import interpreted  # noqa: F401
from test_shards import merged

from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.shard import Shard

triton = pytest.importorskip("pallas_kernels.decode.triton")
pytestmark = pytest.mark.usefixtures("interpreted")


class Sequences(sequences.Sequences):
    function = staticmethod(triton.decode)


SHAPES = {
    "tiles of a page": {"page": 32},
    "heads that share keys": {"page": 64, "K": 2, "G": 7},
    "pages smaller than a tile": {"page": 8, "G": 1, "K": 3},
    "pages of no whole number of tiles": {"page": 24, "G": 3},
    "bfloat16": {"page": 32, "K": 2, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_lengths_around_tiles_and_pages_and_idle_rows_match_the_oracle(shape):
    rows = [after(0), [], after(14), after(15), [], after(16), after(63), after(64), after(95, 3)]
    batch = Sequences([*rows, []], ChunkGeometry(chunk_size=43, local_size=11), **shape)
    batch.check(tile=16, programs=8)


def test_one_window_has_one_view():
    Sequences([after(255), [], after(130, 2)], None).check(tile=32)


@pytest.mark.parametrize("chunk_len", [32, 41, 5])
def test_one_to_eight_tokens_across_a_border_of_chunks_match_the_oracle(chunk_len):
    geometry = ChunkGeometry(chunk_size=chunk_len + 3, local_size=3)
    first = 32 // chunk_len * chunk_len + 2 * chunk_len
    rows = [after(first - 1 - n // 2, n) for n in range(1, 9)]
    Sequences(rows, geometry).check(tile=16)


def test_more_rows_than_one_product_has():
    Sequences([after(37, 12), after(5)], ChunkGeometry(40, 8), G=7).check(tile=16)


def test_heads_of_128_in_the_sizes_that_are_served():
    geometry = ChunkGeometry(chunk_size=160, local_size=32)
    for dtype in ("float32", "bfloat16"):
        Sequences([after(300), after(70)], geometry, page=128, G=7, H=128, dtype=dtype).check()


@pytest.mark.parametrize("programs", [1, 5, 64])
def test_runs_of_any_number_and_length_add_up(programs):
    rows = [after(3), after(700), [], after(77, 2), after(170)]  # up to 44 runs of a tile
    batch = Sequences(rows, ChunkGeometry(100, 36), G=14)
    batch.check(tile=16, programs=programs, num_stages=1)


@settings(
    max_examples=5,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_random_batches_of_random_geometries_match_the_oracle(data):
    shape = {
        "G": data.draw(st.integers(1, 7)),
        "K": data.draw(st.integers(1, 2)),
        "page": data.draw(st.sampled_from([4, 16, 40, 64])),
        "dtype": data.draw(st.sampled_from(["float32", "bfloat16"])),
    }
    sizes = st.integers(2, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))
    geometry = data.draw(st.one_of(st.none(), st.builds(lambda n: ChunkGeometry(*n), sizes)))
    row = st.builds(after, st.integers(0, 180), st.integers(0, 4))
    rows = data.draw(st.lists(row, min_size=1, max_size=4).filter(any))
    batch = Sequences(rows, geometry, seed=data.draw(st.integers(0, 99)), **shape)
    tile = data.draw(st.sampled_from([16, 32]))
    batch.check(tile=tile, programs=data.draw(st.integers(1, 20)))


def test_a_batch_without_a_token_is_empty():
    batch = Sequences([after(5)] * 2, None)
    batch.positions[:] = -1
    out, lse = batch.decode(tile=16)
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()


@pytest.mark.parametrize(
    "geometry", [None, ChunkGeometry(420, 84), ChunkGeometry(100, 20), ChunkGeometry(30, 19)]
)
def test_all_shards_merge_to_the_whole(geometry):
    rows = [after(0), [], after(30, 4), after(95), after(290), after(306, 3)]
    batch = Sequences(rows, geometry, page=96)
    found = [batch.decode(Shard(jnp.int32(i), 32, 3), tile=16) for i in range(3)]
    batch.assert_expected(*merged(found))


def test_what_no_product_takes_is_refused():
    with pytest.raises(Unsupported, match="head_dim=24 must be one of 16, 32"):
        Sequences([after(5)], None, H=24).decode()
    batch = Sequences([after(5)], None)
    batch.queries = batch.queries.astype(jnp.bfloat16)
    with pytest.raises(Unsupported, match="queries are bfloat16, keys float32"):
        batch.decode()
