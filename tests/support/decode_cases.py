"""Conformance tests of decode; a test class of a backend inherits them."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.shard import Shard
from support.draws import drawn_alike
from support.sequences import Sequences, after
from support.shards import merged


def batch(said, rows, geometry, *, marks=(), options=None, **shape):
    """A batch to compare: positions of the newest tokens of each sequence, none in idle rows."""
    return pytest.param((rows, geometry, shape, options or {}), id=said, marks=marks)


class Decode:
    """Batches listed in `batches`, and one that is idle.

    Attributes:
        sequences: what decodes them.
        usual: options where a batch has none.
    """

    sequences: type[Sequences]
    batches: ClassVar[list]
    usual: ClassVar[dict] = {}

    def pytest_generate_tests(self, metafunc):
        for name, found in (("batch", "batches"), ("cut", "cuts")):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, getattr(self, found))

    def test_every_token_matches_the_oracle_and_idle_ones_are_empty(self, batch):
        rows, geometry, shape, options = batch
        self.sequences(rows, geometry, **shape).check(**self.usual | options)

    def test_a_batch_without_a_token_is_empty(self):
        idle = self.sequences([after(5)] * 2, None)
        idle.positions[:] = -1
        out, lse = idle.decode(**self.usual)
        assert (out == 0).all()
        assert (lse == -np.inf).all()


class AnyBatch(Decode):
    """Batches that hypothesis draws.

    Attributes:
        drawn: strategies of the shape, beside heads.
        drawn_options: strategies of options.
        most: the last position, of how many tokens and sequences.
    """

    drawn: ClassVar[dict]
    drawn_options: ClassVar[dict] = {}
    most: ClassVar[tuple[int, int, int]] = (380, 4, 4)

    @drawn_alike(max_examples=8)
    @given(st.data())
    def test_random_batches_of_random_geometries_match_the_oracle(self, data):
        shape = {"G": data.draw(st.integers(1, 7)), "K": data.draw(st.integers(1, 2))}
        shape |= {name: data.draw(of, name) for name, of in self.drawn.items()}
        options = {name: data.draw(of, name) for name, of in self.drawn_options.items()}
        sizes = st.integers(2, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))
        geometry = data.draw(st.one_of(st.none(), st.builds(lambda n: ChunkGeometry(*n), sizes)))
        last, tokens, count = self.most
        row = st.builds(after, st.integers(0, last), st.integers(0, tokens))
        rows = data.draw(st.lists(row, min_size=1, max_size=count).filter(any))
        drawn = self.sequences(rows, geometry, seed=data.draw(st.integers(0, 99)), **shape)
        drawn.check(**options)


class Sharded(Decode):
    """A batch cut into three shards, for each geometry of `cuts`.

    Attributes:
        part: keys of a page that a shard has.
        cut_rows: the batch.
    """

    cuts: ClassVar[list]
    part: int
    cut_rows: ClassVar[list]

    def test_all_shards_merge_to_the_whole(self, cut):
        whole = self.sequences(self.cut_rows, cut, page=3 * self.part)
        found = [whole.decode(Shard(jnp.int32(i), self.part, 3), **self.usual) for i in range(3)]
        out, lse = merged(found)
        whole.assert_expected(out.astype(whole.cache.dtype), lse)
