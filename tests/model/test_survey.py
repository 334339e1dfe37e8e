"""Surveys agree, for each pair of budgets, with the plan of these budgets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import plan as plans
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.select import select_keys, vote
from qwen_jax.sparse.recall import Grid, Survey, recall_grid

PAGE, PAGES = 16, 24
S, T, R, N, K, H = PAGE * PAGES, 160, 24, 4, 2, 8
GRID = Grid(
    vertical=(10, 45, 120, 1000), slash=(60, 105, 150, 1000), last_q=10, tiles=Tiles(q=32, k=8)
)
GEOMETRIES = (None, ChunkGeometry(43, 13), ChunkGeometry(163, 62))  # several borders a slice; one
PIECES = ((0, T), (0, 7), (S - T, T), (131, 1), (57, 100), (200, 33))


@functools.cache
def programs(geometry):
    def take(queries, lse, rows, voters, keys, table, start, length):
        places = jnp.int32(0), table, start, length
        cache = PagedKV(keys=keys, values=keys)  # of which only keys are read
        votes = vote(voters, cache, *places, geometry=geometry)
        found = recall_grid(
            queries,
            lse,
            rows,
            votes,
            cache,
            *places,
            num_queries=T,
            grid=GRID,
            geometry=geometry,
        )
        return votes, found

    def plan(votes, start, length, vertical, slash):
        budgets = jnp.full(N, vertical), jnp.full(N, slash)
        listed = plans.build(
            *select_keys(votes, start + length, *budgets),
            start,
            length,
            num_queries=T,
            num_columns=S,
            tiles=GRID.tiles,
        )
        mask = plans.to_mask(listed, start, length, num_keys=S)
        return mask, plans.density(listed, start, length)

    return jax.jit(take), jax.jit(plan)


def attention(queries, keys, rows, start, geometry):
    """Weights [N, R, S] and log-sum-exp [R, N] in float64, from the definition of DCA."""
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    view = np.zeros((len(rows), S), int)
    if geometry is not None:
        chunk = geometry.chunk_size - geometry.local_size
        apart = (start + rows)[:, None] // chunk - np.arange(S) // chunk
        view = np.clip(apart, 0, 2)
    keys = keys.repeat(N // K, 1)
    each = np.stack([np.einsum("RNH,SNH->NRS", one, keys) for one in queries])
    logits = np.take_along_axis(each, view[None, None], 0)[0]
    logits = np.where(np.arange(S) <= (start + rows)[:, None], logits, -np.inf)
    lse = np.log(np.exp(logits).sum(-1))
    return np.exp(logits - lse[..., None]), lse.T


def surveyed(geometry, start, length, seed=0):
    """Votes and survey of a random slice, and its attention [N, R, S] in some rows."""
    rng = np.random.default_rng([seed, start, length])
    views = 1 if geometry is None else 3
    flat = rng.standard_normal((S, K, H)).astype(np.float32)
    queries = rng.standard_normal((views, T, N, H)).astype(np.float32)
    voters = rng.standard_normal((views, GRID.last_q, N, H)).astype(np.float32)
    rows = np.arange(R, dtype=np.int32) * length // R
    weights, lse = attention(queries[:, rows], flat, rows, start, geometry)
    table = rng.permutation(PAGES).astype(np.int32)
    flat[start + length :] = 1e3  # what an earlier sequence left behind
    cache = np.zeros((1, K, PAGES, PAGE, H), np.float32)
    cache[0][:, table] = flat.reshape(PAGES, PAGE, K, H).transpose(2, 0, 1, 3)
    votes, found = programs(geometry)[0](
        *map(jnp.asarray, (queries[:, rows], lse.astype(np.float32), rows, voters, cache, table)),
        jnp.int32(start),
        jnp.int32(length),
    )
    return votes, found, rows, weights


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("start", "length"), PIECES)
def test_every_pair_of_budgets_finds_what_its_plan_reads(geometry, start, length):
    votes, found, rows, weights = surveyed(geometry, start, length)
    recall, density = found.recall(), found.density()
    assert recall.shape == density.shape == (N, len(GRID.vertical), len(GRID.slash))
    for v, vertical in enumerate(GRID.vertical):
        for s, slash in enumerate(GRID.slash):
            mask, share = programs(geometry)[1](
                votes, jnp.int32(start), jnp.int32(length), jnp.int32(vertical), jnp.int32(slash)
            )
            read = np.asarray(mask)[:, rows]
            expected = (weights * read).sum(-1).mean(-1)
            np.testing.assert_allclose(recall[:, v, s], expected, atol=2e-6)
            np.testing.assert_allclose(density[:, v, s], share, rtol=2e-7)
    for table in recall, density:
        assert (np.diff(table, axis=-1) >= 0).all()
        assert (np.diff(table, axis=-2) >= 0).all()
        np.testing.assert_allclose(table[:, -1, -1], 1, atol=2e-6)
    if length > 30 and start:  # else this would prove nothing
        assert (recall[:, 0, 0] < 0.9).all()
        assert (np.ptp(density, axis=(1, 2)) > 0.1).all()


def test_the_figures_of_layers_are_told_apart():
    _, one, _, _ = surveyed(None, 57, 100)
    _, other, _, _ = surveyed(None, 200, 33)
    both = Survey(*(np.stack(parts) for parts in zip(one, other, strict=True)))
    for layer, each in enumerate((one, other)):
        np.testing.assert_array_equal(both.recall()[layer], each.recall())
        np.testing.assert_array_equal(both.density()[layer], each.density())
