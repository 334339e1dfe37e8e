"""Conformance tests of prefill; a test class of a backend inherits them.

A class names its kernel and its cases, and inherits `Dense`, `Planned`, `AnySlice` and `Sharded`,
or those of them that it has cases for. Outputs are compared with attention in float64.
"""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import plan as plans
from support import oracle, shards
from support.draws import drawn_alike
from support.paged import LAYER, PAGES, poison, random_inputs
from support.tolerances import LIMIT, assert_close


def of(name, *rows, dtype="float32", tiles=None, marks=()):
    """Slices of a named case to compare.

    Args:
        rows: start and length of each; by a plan also columns and diagonals of each head.
        tiles: of the plan.
    """
    said = [name, dtype, *([] if tiles is None else [f"{tiles.q}x{tiles.k}"])]
    return pytest.param((name, dtype, tiles, rows), id=", ".join(said), marks=marks)


class Kernel:
    """A kernel, its inputs and its oracle.

    Attributes:
        function: called as `api.prefill`.
        options: it gets besides.
        cases: by name.
        columns: of a plan, at most.
        limits: of outputs, by their dtype.
        lse_limits: of log-sum-exps, by the dtype of outputs.
        scaled: whether queries are multiplied by the softmax scale.
        finite: whether rows of padding are.
    """

    function: Any
    options: ClassVar[dict] = {}
    cases: ClassVar[dict]
    columns = 40
    limits: ClassVar[dict] = LIMIT
    lse_limits: ClassVar[dict] = dict.fromkeys(LIMIT, LIMIT["float32"])
    scaled = False
    finite = True

    def pytest_generate_tests(self, metafunc):
        for name in ("dense", "planned", "drawn"):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, getattr(self, name))

    def done(self):
        """Called after each run."""

    @classmethod
    def dense_options(cls, case):
        """Options of an attention without a plan."""
        return {}

    @classmethod
    @functools.cache
    def compiled(cls, case, tiles, **options):
        """The kernel, dense for tiles None, else by a plan of these tiles."""

        def run(queries, kv, layer, table, start, length, verticals, slashes):
            plan = mask = None
            more = cls.options | options
            if tiles is None:
                more = more | cls.dense_options(case)
            else:
                plan = plans.build(
                    verticals,
                    slashes,
                    start,
                    length,
                    num_queries=case.slice_len,
                    num_columns=cls.columns,
                    tiles=tiles,
                )
                mask = plans.to_mask(plan, start, length, num_keys=verticals.shape[1])
            args = queries, kv, layer, table, start, length
            return *cls.function(*args, geometry=case.geometry, plan=plan, **more), mask

        return jax.jit(run)

    def inputs(self, case, dtype, start, length, selected=None, seed=0):
        """Arguments of `compiled`, and keys and values in the order of the sequence."""
        rng, cache, flat, table = random_inputs(case, jnp.dtype(dtype), seed)
        views = 1 if case.geometry is None else 3
        shape = views, case.slice_len, case.num_heads, case.head_dim
        queries = rng.standard_normal(shape).astype(dtype)
        if self.scaled:
            queries *= np.asarray(case.head_dim**-0.5, dtype)
        if selected is None:
            selected = np.zeros((2, case.num_heads, len(flat[0])), bool)
        where = jnp.int32(LAYER), jnp.asarray(table), jnp.int32(start), jnp.int32(length)
        kv = poison(cache, case, table, start + length)
        return (jnp.asarray(queries), kv, *where, *selected), flat

    def check(self, case, dtype, start, length, tiles=None, selected=None, seed=0, **options):
        """Compare a slice with the oracle; a row that reads no key is empty."""
        args, flat = self.inputs(case, dtype, start, length, selected, seed)
        out, lse, mask = self.compiled(case, tiles, **options)(*args)
        self.done()
        out, lse = np.asarray(out), np.asarray(lse)
        assert out.dtype == dtype
        assert lse.dtype == np.float32
        assert np.isfinite(out.astype(np.float32)).all() or not self.finite
        mask = None if mask is None else np.asarray(mask)
        given = args[0], *flat, start, length, case.geometry, mask
        expected, expected_lse = (x[:length] for x in oracle.attention(*given))
        out, lse = out[:length], lse[:length]
        seen = expected_lse > -np.inf
        assert (out[~seen] == 0).all()
        assert (lse[~seen] == -np.inf).all()
        if seen.any():
            assert_close(out, expected, self.limits[dtype])
            assert_close(lse[seen], expected_lse[seen], self.lse_limits[dtype])


def selection(rng, case, end, columns, diagonals):
    """Columns and diagonals of each head; head 0 has columns alone, if there is another."""
    selected = np.zeros((2, case.num_heads, (PAGES - 1) * case.page), bool)
    for head in range(case.num_heads):
        selected[0, head, rng.permutation(end)[:columns]] = True
        alone = head == 0 and case.num_heads > 1
        selected[1, head, rng.permutation(end)[: 0 if alone else diagonals]] = True
    return selected


class Dense(Kernel):
    """Slices without a plan, listed in `dense`."""

    def test_dense_attention_matches_the_oracle(self, dense):
        name, dtype, _, rows = dense
        for start, length in rows:
            self.check(self.cases[name], dtype, start, length)


class Planned(Kernel):
    """Slices by a plan, listed in `planned`."""

    def test_a_plan_gives_dense_attention_under_its_mask(self, planned):
        name, dtype, tiles, rows = planned
        rng, case = np.random.default_rng(1), self.cases[name]
        for start, length, columns, diagonals in rows:
            selected = selection(rng, case, start + length, columns, diagonals)
            self.check(case, dtype, start, length, tiles, selected)


class AnySlice(Kernel):
    """Slices that hypothesis draws, of the cases and tiles in `drawn`."""

    @drawn_alike(max_examples=12)
    @given(data=st.data())
    def test_attention_is_right_for_every_slice(self, drawn, data):
        name, tiles = data.draw(st.sampled_from(drawn), "case")
        case = self.cases[name]
        end = data.draw(st.integers(1, (PAGES - 1) * case.page), "end")
        length = data.draw(st.integers(1, min(end, case.slice_len)), "length")
        columns = data.draw(st.sampled_from([0, 1, self.columns]), "columns")
        diagonals = data.draw(st.sampled_from([0, 1, 5, 704]), "diagonals")
        selected = selection(np.random.default_rng(end), case, end, columns, diagonals)
        self.check(case, "float32", end - length, length, tiles, selected, seed=end)


class Sharded(Kernel):
    """The whole cache cut into shards.

    Attributes:
        sharded: the cache that is cut.
    """

    sharded = shards.Cut()

    def test_attention_of_all_shards_is_that_of_the_whole(self):
        geometry = shards.GEOMETRIES["borders in and between parts"]
        first, *_, last = shards.SLICES
        attend = functools.partial(self.function, **self.options)
        for plan in (None, shards.random_plan):
            self.sharded.prefill(attend, geometry, (first, last), plan)
