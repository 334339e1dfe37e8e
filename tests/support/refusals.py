"""Shapes that kernels refuse as soon as they are traced."""

import jax
import pytest

from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.paged_kv import PagedKV

PIECE = (3,), (), ()  # table, start and length
BATCH = (1, 3), (1, 1)  # tables and positions


def refused(
    function,
    match,
    *,
    rows=(64,),
    heads=2,
    head_dim=128,
    page=64,
    pages=4,
    where=PIECE,
    queries="bfloat16",
    keys="bfloat16",
    values=None,
    **options,
):
    """Asserts that an operation says why it does not take a shape.

    Args:
        function: called as `api.prefill`, `api.vote` or, with `BATCH`, `api.decode`.
        rows: of queries, before heads.
        queries, keys, values: their dtypes; values as keys.
    """
    cache = 1, 1, pages, page, head_dim
    described = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, *rows, heads, head_dim), queries),
            (cache, keys),
            (cache, values or keys),
            *((shape, "int32") for shape in ((), *where)),
        )
    ]
    with pytest.raises(Unsupported, match=match):
        jax.eval_shape(
            lambda queries, keys, values, *rest: function(
                queries, PagedKV(keys, values), *rest, geometry=None, **options
            ),
            *described,
        )
