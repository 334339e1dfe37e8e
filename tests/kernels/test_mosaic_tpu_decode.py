"""Decode for TPU in the TPU interpreter, which raises on races, stale memory and stray reads."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from support import sequences
from support.decode_cases import AnyBatch, batch
from support.mosaic_tpu_interpreter import NOWHERE, Raceless, interpreter
from support.sequences import after

from pallas_kernels import softmax
from pallas_kernels.decode import mosaic_tpu
from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.geometry import INTER, SUCC, ChunkGeometry


class Sequences(Raceless, sequences.Sequences):
    """Pages without a key of their sequence lie outside the cache: to read one is an error."""

    function = staticmethod(mosaic_tpu.decode)
    shape = MappingProxyType({"page": 128, "pages": 3})
    nowhere = NOWHERE

    def decode(self, *args, block=128, cores=1, interpret=None, **options):
        """With steps of `block` keys, which `cores` share."""
        _, _, K, _, _, H = self.cache.shape
        interpret = interpreter(cores) if interpret is None else interpret
        size = block * K * H * self.cache.dtype.itemsize
        return super().decode(*args, block_bytes=size, cores=cores, interpret=interpret, **options)


def lengths(name, page=128, *, options=None, **shape):
    """Lengths around pages, and idle rows."""
    rows = [
        *[after(0), [], after(page - 2), [], [], after(page - 1)],
        *[after(page), after(300), after(301, 3), []],
    ]
    return batch(name, rows, ChunkGeometry(100, 28), page=page, options=options, **shape)


def across(length):
    """One to eight tokens across a border of chunks of this length."""
    rows = [after(2 * length - 1 - n // 2, n) for n in range(1, 9)]
    return batch(f"across a border of chunks of {length}", rows, ChunkGeometry(length + 40, 40))


class TestDecode(AnyBatch):
    sequences = Sequences
    batches = (
        lengths("a page a block", options={"cores": 2}),
        lengths("heads share blocks of two pages", K=2, G=3, options={"block": 256}),
        lengths("blocks are parts of pages", 256, pages=2, options={"cores": 3}),
        lengths("blocks are many small pages", 32, pages=10, options={"block": 256}),
        lengths("bfloat16", dtype="bfloat16", K=2, options={"block": 256, "cores": 2}),
        batch("one window", [after(255), [], after(130, 2)], None),
        *map(across, (128, 150)),
    )
    drawn = MappingProxyType(
        {
            "page": st.sampled_from([64, 128, 256]),
            "pages": st.just(6),
            "dtype": st.sampled_from(["float32", "bfloat16"]),
        }
    )
    drawn_options = MappingProxyType(
        {"block": st.sampled_from([128, 256, 384]), "cores": st.integers(1, 3)}
    )
    most = 380, 4, 4


def test_two_shards_merge_to_the_whole():
    geometry = ChunkGeometry(chunk_size=148, local_size=20)
    batch = Sequences([after(300, 3), after(260, 2), after(383)], geometry)
    # To the first two chunks, the third one's queries look as the second one's would, moved on.
    front = batch.decode(
        queries=batch.queries[[SUCC, INTER, INTER]],
        positions=np.where(batch.positions < 0, -1, 255),
    )
    back = batch.decode(
        table=batch.table[:, 2:],
        positions=np.where(batch.positions < 0, -1, batch.positions - 256),
    )
    shards = map(jnp.asarray, (*front, *back))
    batch.assert_expected(*map(np.asarray, softmax.merge(*shards)))


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
    rows = [after(0), [], after(700, 2), after(511)]
    batch = Sequences(rows, None, page=512, pages=2, K=2)
    batch.check(block=256, cores=2)
    jax.effects_barrier()
    lens = np.array(batch.lens)[:, None]
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
        Sequences([after(5)], None, page=96).decode()


def test_a_head_that_does_not_fill_the_lanes_is_refused():
    batch = Sequences([after(5)], None)
    with pytest.raises(Unsupported, match="head_dim=16 must be 128"):
        batch.decode(interpret=False)
