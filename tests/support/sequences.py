"""Sequences whose newest tokens attend to a paged cache, for tests of kernels that decode."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.shard import WHOLE
from support import oracle
from support.tolerances import assert_close

LAYER = 1


class Sequences:
    """Random keys and values of B sequences, in a cache that holds nan everywhere else.

    Attributes:
        function: that decodes.
        options: it gets besides.
        nowhere: what the table names where a sequence has no keys; page 0 has none.
        shape: of the cache, where a batch does not say it; `pages` of a table, or as many as
            the longest sequence has and one.
    """

    function: Any = None
    options: ClassVar[dict] = {}
    nowhere = 0
    shape: ClassVar[dict] = {}

    def __init__(self, rows, geometry, *, seed=0, **shape):
        usual = {"G": 2, "K": 1, "H": 16, "page": 32, "dtype": "float32", "pages": None}
        G, K, H, page, dtype, pages = (usual | self.shape | shape).values()
        rng = np.random.default_rng(seed)
        B, Q = len(rows), max(map(len, rows))
        self.rows, self.geometry = rows, geometry
        self.lens = [max(row, default=-1) + 1 for row in rows]
        used = [-(-n // page) for n in self.lens]
        where = iter(rng.permutation(np.arange(1, sum(used) + 1)))
        self.table = np.full((B, pages or max(used) + 1), self.nowhere, np.int32)
        self.cache = np.full((2, 2, K, sum(used) + 1, page, H), np.nan, dtype)
        self.flat = [rng.standard_normal((2, n, K, H)).astype(dtype) for n in self.lens]
        for b in range(B):
            self.table[b, : used[b]] = [next(where) for _ in range(used[b])]
            for s in range(self.lens[b]):
                at = self.table[b, s // page], s % page
                self.cache[:, LAYER, :, *at] = self.flat[b][:, s]
        self.positions = np.array([[*row, *[-1] * (Q - len(row))] for row in rows], np.int32)
        views = 1 if geometry is None else 3
        self.queries = (rng.standard_normal((views, B, Q, K * G, H)) * 16 / H).astype(dtype)
        self.queries[:, self.positions < 0] = 1e3  # idle

    def decode(self, shard=WHOLE, *, queries=None, table=None, positions=None, **options):
        keys, values = self.cache
        if shard.count > 1:
            first = int(shard.index) * shard.part
            keys, values = self.cache[..., first : first + shard.part, :]
        options = self.options | options
        decode = functools.partial(
            type(self).function, geometry=self.geometry, shard=shard, **options
        )
        found = jax.jit(decode)(
            jnp.asarray(self.queries if queries is None else queries),
            PagedKV(jnp.asarray(keys), jnp.asarray(values)),
            jnp.int32(LAYER),
            jnp.asarray(self.table if table is None else table),
            jnp.asarray(self.positions if positions is None else positions),
        )
        found = tuple(map(np.asarray, found))
        self.done()
        return found

    def done(self):
        """Called after each run."""

    def check(self, **options):
        out, lse = self.decode(**options)
        assert out.dtype == self.cache.dtype
        assert lse.dtype == np.float32
        self.assert_expected(out, lse)

    def assert_expected(self, out, lse):
        idle = self.positions < 0
        assert (out[idle] == 0).all()
        assert (lse[idle] == -np.inf).all()
        for b, row in enumerate(self.rows):
            if row:
                given = self.queries[:, b], *self.flat[b], row[0], len(row), self.geometry
                for found, wanted in zip((out, lse), oracle.attention(*given), strict=True):
                    assert_close(found[b, : len(row)], wanted[: len(row)])


def after(position, count=1):
    """Positions of `count` consecutive tokens."""
    return list(range(position, position + count))
