"""Decode for TPU in the TPU interpreter, which raises on races, stale memory and stray reads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from support import oracle
from support.tolerances import assert_close

from pallas_kernels import softmax
from pallas_kernels.decode import mosaic_tpu
from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.geometry import INTER, SUCC, ChunkGeometry
from pallas_kernels.paged_kv import PagedKV

LAYER, NOWHERE = 1, 2**30


def interpreter(cores):
    return pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        num_cores_or_threads=cores,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a cache; keys a step, and cores that share the steps."""

    group: int = 2
    num_kv_heads: int = 1
    head_dim: int = 16
    page: int = 128
    num_pages: int = 3
    block: int = 128
    dtype: str = "float32"
    cores: int = 1

    @property
    def block_bytes(self):
        itemsize = jnp.dtype(self.dtype).itemsize
        return self.block * self.num_kv_heads * self.head_dim * itemsize


class Sequences:
    """Random keys and values of B sequences, in a cache that holds nan everywhere else.

    Pages without a key of their sequence lie outside the cache: to read one is an error.
    """

    def __init__(self, shape, rows, geometry, seed=0):
        rng = np.random.default_rng(seed)
        B, Q = len(rows), max(map(len, rows))
        K, H, page = shape.num_kv_heads, shape.head_dim, shape.page
        self.shape, self.geometry = shape, geometry
        self.rows, self.lens = rows, [max(row, default=-1) + 1 for row in rows]
        dtype = jnp.dtype(shape.dtype)
        used = [-(-n // page) for n in self.lens]
        where = iter(rng.permutation(np.arange(1, sum(used) + 1)))
        self.table = np.full((B, shape.num_pages), NOWHERE, np.int32)
        cache = np.full((2, 2, K, sum(used) + 1, page, H), np.nan, dtype)
        self.flat = [rng.standard_normal((2, n, K, H)).astype(dtype) for n in self.lens]
        for b in range(B):
            self.table[b, : used[b]] = [next(where) for _ in range(used[b])]
            for s in range(self.lens[b]):
                cache[:, LAYER, :, self.table[b, s // page], s % page] = self.flat[b][:, s]
        self.cache = PagedKV(*map(jnp.asarray, cache))
        self.positions = np.array([[*row, *[-1] * (Q - len(row))] for row in rows], np.int32)
        views = 1 if geometry is None else 3
        queries = rng.standard_normal((views, B, Q, K * shape.group, H)) * 16 / H
        self.queries = queries.astype(dtype)

    def decode(self, queries=None, table=None, positions=None, interpret=None):
        out, lse = jax.jit(
            functools.partial(
                mosaic_tpu.decode,
                geometry=self.geometry,
                block_bytes=self.shape.block_bytes,
                cores=self.shape.cores,
                interpret=interpreter(self.shape.cores) if interpret is None else interpret,
            )
        )(
            jnp.asarray(self.queries if queries is None else queries),
            self.cache,
            jnp.int32(LAYER),
            jnp.asarray(self.table if table is None else table),
            jnp.asarray(self.positions if positions is None else positions),
        )
        out, lse = np.asarray(out), np.asarray(lse)
        assert not interpret_pallas_call.races.races_found
        return out, lse

    def assert_expected(self, out, lse):
        assert out.dtype == jnp.dtype(self.shape.dtype)
        assert lse.dtype == np.float32
        idle = self.positions < 0
        assert (out[idle] == 0).all()
        assert (lse[idle] == -np.inf).all()
        for b, row in enumerate(self.rows):
            if row:
                count = slice(len(row))
                queries, flat = self.queries[:, b], self.flat[b]
                expected, expected_lse = oracle.attention(
                    queries, *flat, row[0], len(row), self.geometry
                )
                assert_close(out[b, count], expected[count])
                assert_close(lse[b, count], expected_lse[count])


def after(position, count=1):
    """Positions of `count` consecutive tokens."""
    return list(range(position, position + count))


SHAPES = {
    "a page a block": Shape(cores=2),
    "heads share blocks of two pages": Shape(num_kv_heads=2, group=3, block=256),
    "blocks are parts of pages": Shape(page=256, num_pages=2, cores=3),
    "blocks are many small pages": Shape(page=32, num_pages=10, block=256),
    "bfloat16": Shape(dtype="bfloat16", num_kv_heads=2, block=256, cores=2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_lengths_around_pages_and_idle_rows_match_the_oracle(shape):
    rows = [
        *[after(0), [], after(shape.page - 2), [], [], after(shape.page - 1)],
        *[after(shape.page), after(300), after(301, 3), []],
    ]
    sequences = Sequences(shape, rows, ChunkGeometry(chunk_size=100, local_size=28))
    sequences.assert_expected(*sequences.decode())


def test_one_window_has_one_view():
    sequences = Sequences(Shape(), [after(255), [], after(130, 2)], None)
    sequences.assert_expected(*sequences.decode())


@pytest.mark.parametrize("chunk_len", [128, 150])
def test_one_to_eight_tokens_across_a_border_of_chunks_match_the_oracle(chunk_len):
    geometry = ChunkGeometry(chunk_size=chunk_len + 40, local_size=40)
    rows = [after(2 * chunk_len - 1 - n // 2, n) for n in range(1, 9)]
    sequences = Sequences(Shape(), rows, geometry)
    sequences.assert_expected(*sequences.decode())


@settings(max_examples=4, derandomize=True, deadline=None)
@given(st.data())
def test_random_batches_of_random_geometries_match_the_oracle(data):
    shape = Shape(
        group=data.draw(st.integers(1, 7)),
        num_kv_heads=data.draw(st.integers(1, 2)),
        page=data.draw(st.sampled_from([64, 128, 256])),
        num_pages=6,
        block=data.draw(st.sampled_from([128, 256, 384])),
        dtype=data.draw(st.sampled_from(["float32", "bfloat16"])),
        cores=data.draw(st.integers(1, 3)),
    )
    sizes = st.integers(2, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))
    geometry = data.draw(st.one_of(st.none(), st.builds(lambda n: ChunkGeometry(*n), sizes)))
    row = st.builds(after, st.integers(0, 380), st.integers(0, 4))
    rows = data.draw(st.lists(row, min_size=1, max_size=4).filter(any))
    sequences = Sequences(shape, rows, geometry, seed=data.draw(st.integers(0, 99)))
    sequences.assert_expected(*sequences.decode())


def test_a_batch_without_a_token_is_empty():
    out, lse = Sequences(Shape(), [after(5)] * 2, None).decode(
        positions=np.full((2, 1), -1, np.int32)
    )
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_two_shards_merge_to_the_whole():
    geometry = ChunkGeometry(chunk_size=148, local_size=20)
    sequences = Sequences(Shape(), [after(300, 3), after(260, 2), after(383)], geometry)
    # To the first two chunks, the third one's queries look as the second one's would, moved on.
    front = sequences.decode(
        queries=sequences.queries[[SUCC, INTER, INTER]],
        positions=np.where(sequences.positions < 0, -1, 255),
    )
    back = sequences.decode(
        table=sequences.table[:, 2:],
        positions=np.where(sequences.positions < 0, -1, sequences.positions - 256),
    )
    shards = map(jnp.asarray, (*front, *back))
    sequences.assert_expected(*map(np.asarray, softmax.merge(*shards)))


@pytest.mark.parametrize(("page", "block"), [(1024, 4096), (1024, 512), (896, 1792), (64, 256)])
def test_each_key_is_fetched_once_and_five_percent_more_at_most(page, block):
    for kv_len in [0, 1, 127, 128, 129, block, block + 1, 2560, 2561, 100_001, 1_010_000]:
        j = np.arange(-(-kv_len // block))
        counts = mosaic_tpu.fetched(kv_len, j, page=page, block=block)
        assert (counts[:-1] == block).all()
        assert kv_len <= counts.sum() < kv_len + mosaic_tpu.GRANULE
        assert counts.sum() <= 1.05 * kv_len or kv_len < 20 * mosaic_tpu.GRANULE


def test_the_kernel_copies_what_it_should_fetch_and_no_more(monkeypatch):
    copied = []
    make = pltpu.make_async_copy

    class Counted:
        def __init__(self, *refs):
            self.copy, self.size = make(*refs), refs[0].shape[1]

        def start(self):
            jax.debug.callback(lambda: copied.append(self.size))
            self.copy.start()

        def wait(self):
            self.copy.wait()

    monkeypatch.setattr(pltpu, "make_async_copy", Counted)
    shape = Shape(page=512, num_pages=2, num_kv_heads=2, block=256, cores=2)
    sequences = Sequences(shape, [after(0), [], after(700, 2), after(511)], None)
    sequences.assert_expected(*sequences.decode())
    jax.effects_barrier()
    lens = np.array(sequences.lens)[:, None]
    keys = mosaic_tpu.fetched(lens, np.arange(4), page=512, block=256).sum()
    assert sum(copied) == 2 * keys == 2 * (128 + 768 + 512)


def test_a_step_has_a_mebibyte_of_keys():
    assert mosaic_tpu.block_of(1024, 987, 256) == 4096
    assert mosaic_tpu.block_of(1024, 987, 4 * 256) == 1024
    assert mosaic_tpu.block_of(1024, 987, 8 * 256) == 512
    assert mosaic_tpu.block_of(896, 10, 4 * 256) == 896
    assert mosaic_tpu.block_of(64, 3, 256) == 256
    assert mosaic_tpu.block_of(1024, 1, 256) == 1024


def test_a_page_that_rows_of_lanes_cannot_fill_is_refused():
    with pytest.raises(Unsupported, match="page=96 must divide 128"):
        Sequences(Shape(page=96), [after(5)], None).decode()


def test_a_head_that_does_not_fill_the_lanes_is_refused():
    sequences = Sequences(Shape(), [after(5)], None)
    with pytest.raises(Unsupported, match="head_dim=16 must be 128"):
        sequences.decode(interpret=False)
