"""Conformance tests of the vote; a test class of a backend inherits them."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.paged_kv import PagedKV
from support import sparse_oracle
from support.draws import drawn_alike
from support.tolerances import assert_close

LAYER = 1


def slices(said, geometry, *starts, marks=(), options=None, **shape):
    """Slices to compare: start and length of each."""
    return pytest.param((geometry, starts, shape, options or {}), id=said, marks=marks)


class Vote:
    """Slices listed in `voting`.

    Attributes:
        function: called as `api.vote`.
        options: it gets besides.
        shape: of the cache and of queries, where slices do not say it.
        nowhere: what the table names where there are no keys; page 0 has none.
        limit: of the error; default: that of float32.
    """

    function: Any
    options: ClassVar[dict] = {}
    shape: ClassVar[dict] = {}
    nowhere = 0
    limit: float | None = None
    voting: ClassVar[list]

    def pytest_generate_tests(self, metafunc):
        for name in ("voting", "drawn"):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, getattr(self, name))

    def done(self):
        """Called after each run."""

    @classmethod
    @functools.cache
    def compiled(cls, geometry, **options):
        options = cls.options | options
        return jax.jit(functools.partial(cls.function, geometry=geometry, **options))

    def check(self, start, length, geometry, options=None, **shape):
        """Compare votes of one slice; what lies after it, in its last page too, is nan."""
        usual = {"N": 2, "K": 1, "R": 20, "H": 16, "page": 64, "pages": 6, "dtype": "float32"}
        N, K, R, H, page, pages, dtype = (usual | self.shape | shape).values()
        rng = np.random.default_rng(start * 1000 + length)
        end, S = start + length, pages * page
        flat = rng.standard_normal((S, K, H)).astype(jnp.dtype(dtype))
        flat[end:] = np.nan
        used = -(-end // page)
        table = np.full(pages, self.nowhere, np.int32)
        table[:used] = rng.permutation(np.arange(1, used + 1))
        cache = np.full((2, K, pages + 1, page, H), np.nan, flat.dtype)
        for number in range(used):
            rows = flat[number * page : (number + 1) * page]
            cache[LAYER, :, table[number]] = rows.swapaxes(0, 1)
        views = 1 if geometry is None else 3
        queries = (rng.standard_normal((views, R, N, H)) * 6 / H).astype(flat.dtype)
        queries[:, : max(R - length, 0)] = 1e3  # rows before the slice do not vote
        sums = self.compiled(geometry, **options or {})(
            jnp.asarray(queries),
            PagedKV(*2 * [jnp.asarray(cache)]),
            jnp.int32(LAYER),
            jnp.asarray(table),
            jnp.int32(start),
            jnp.int32(length),
        )
        self.done()
        expected = sparse_oracle.votes(queries, flat, start, length, geometry)
        for actual, wanted in zip(sums, expected, strict=True):
            assert actual.shape == (N, S)
            assert actual.dtype == jnp.float32
            assert_close(actual[:, :end], wanted, self.limit)
            assert (np.asarray(actual)[:, end:] == 0).all()

    def test_votes_equal_the_sums_of_softmax(self, voting):
        geometry, starts, shape, options = voting
        for start, length in starts:
            self.check(start, length, geometry, options, **shape)


class AnySlice(Vote):
    """Slices that hypothesis draws, of geometries in `drawn`, in `keys` keys."""

    drawn: ClassVar[list]
    drawn_shape: ClassVar[dict] = {}
    keys: int

    @drawn_alike(max_examples=10)
    @given(data=st.data())
    def test_votes_equal_the_sums_of_softmax_of_any_slice(self, drawn, data):
        geometry = data.draw(st.sampled_from(drawn), "geometry")
        start = data.draw(st.integers(0, self.keys - 1), "start")
        length = data.draw(st.integers(1, self.keys - start), "length")
        self.check(start, length, geometry, **self.drawn_shape)
