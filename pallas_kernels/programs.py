"""Operations at a given shape as a function and its inputs: to be timed, tuned, compiled."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import plan
from pallas_kernels.cases import Served
from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.tiles import Tiles, of_page
from pallas_kernels.paged_kv import PagedKV

PROGRAMS = {
    "prefill": "prefill",
    "sparse prefill": "prefill",
    "decode": "decode",
    "selection": "select",
}
"""The operation that each program runs."""
DENSE = "prefill", "decode"
"""Programs that run where nothing is prefilled by a plan."""
VOTERS = 64  # queries that select
PLAN = Tiles(q=1024, k=128)  # of sparse prefill


def program(name: str, case: Served, choice: backend.Choice = None, **keywords) -> Callable:
    """Return an operation as a function of its `inputs`."""
    run = functools.partial(
        backend.call, PROGRAMS[name], choice, geometry=case.geometry, **keywords
    )
    if name != "sparse prefill":
        return run
    return lambda listed, *args: run(*args, plan=listed)


def inputs(
    name: str, case: Served, dtype=jnp.bfloat16, tiles: Tiles = PLAN
) -> tuple[Array | PagedKV | plan.SparsePlan, ...]:
    """Random queries at the end of the context, random keys and values.

    Sparse prefill also gets a plan: as many columns as there may be, evenly spaced, and the
    nearest sixteenth of the diagonals. `jax.eval_shape` gives the shapes at no cost.
    """
    K, H, page = case.num_kv_heads, case.head_dim, case.page
    P, T = -(-case.context // page), case.slice_len
    rng = iter(jax.random.split(jax.random.key(0, impl="rbg"), 3))  # which compiles soonest

    def normal(*shape: int) -> Array:
        return jax.random.normal(next(rng), shape, dtype)

    def queries(*shape: int) -> Array:
        views = 1 if case.geometry is None else 3
        return normal(views, *shape, case.num_heads, H) * jnp.asarray(H**-0.5, dtype)

    def cache() -> PagedKV:
        shape = case.num_layers, K, case.num_pages, page, H
        return PagedKV(normal(*shape), normal(*shape))

    layer = jnp.int32(case.num_layers - 1)
    table = jnp.arange(P, dtype=jnp.int32) % case.num_pages
    start, length = jnp.int32(case.context - T), jnp.int32(T)
    if name == "decode":
        B = case.num_seqs
        first = jnp.arange(B, dtype=jnp.int32)[:, None] * P
        tables = (first + jnp.arange(P, dtype=jnp.int32)) % case.num_pages
        positions = jnp.full((B, 1), case.context - 1, jnp.int32)
        return queries(B, 1), cache(), layer, tables, positions
    if name == "selection":
        return queries(VOTERS), cache(), layer, table, start, length
    args = queries(T), cache(), layer, table, start, length
    if name == "prefill":
        return args
    place = jnp.arange(P * page, dtype=jnp.int32)
    step = -(-case.context // case.num_columns)
    verticals = (place % step == 0) & (place < case.context)
    slashes = (place >= case.context - case.context // 16) & (place < case.context)
    listed = plan.build(
        jnp.tile(verticals, (case.num_heads, 1)),
        jnp.tile(slashes, (case.num_heads, 1)),
        start,
        length,
        num_queries=T,
        num_columns=case.num_columns,
        tiles=Tiles(min(T, tiles.q), of_page(page, tiles.k)),
    )
    return listed, *args
