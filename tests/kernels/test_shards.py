"""Kernels on shards of a cache: their results, merged, are those of the whole in float64.

One process stands in for all devices. Attention runs once for each shard; the vote, in which
shards talk to each other, runs for all of them in `vmap`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from support import oracle, sparse_oracle
from support.tolerances import LIMIT, assert_close

from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import ABSENT, SparsePlan
from pallas_kernels.shard import Shard

LAYER, NOWHERE = 1, 2**30
PART, PAGES, COUNT = 32, 12, 3
PAGE = PART * COUNT
S = PAGES * PAGE  # so that each shard has three steps of 128 keys
K, N, H, T = 1, 2, 16, 40
DTYPE = jnp.dtype("float32")
GEOMETRIES = {
    "one window": None,
    "borders in and between parts": ChunkGeometry(chunk_size=420, local_size=84),
    "chunks of two parts and a half": ChunkGeometry(chunk_size=100, local_size=20),
    "chunks smaller than a part": ChunkGeometry(chunk_size=30, local_size=19),
}
INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
OPTIONS = {
    "mosaic_tpu": {"interpret": INTERPRET},
    "xla": {},
    "reference": {},
}
each_backend = pytest.mark.parametrize("name", OPTIONS)
SOON = ("borders in and between parts",)
each_geometry = pytest.mark.parametrize(
    "geometry",
    [
        pytest.param(geometry, id=name, marks=() if name in SOON else pytest.mark.long)
        for name, geometry in GEOMETRIES.items()
    ],
)


def function(operation, name):
    implementation = getattr(backend.load(operation, name), backend.FUNCTIONS[operation])
    return functools.partial(implementation, **OPTIONS[name])


def paged(tables, flats):
    """Sequences [n, K, H] in a cache that holds nan everywhere else."""
    cache = np.full((2, K, tables.size + 1, PAGE, H), np.nan, DTYPE)
    for table, flat in zip(tables, flats, strict=True):
        for s in range(len(flat)):
            cache[LAYER, :, table[s // PAGE], s % PAGE] = flat[s]
    return cache


def cut(cache, index):
    return jnp.asarray(cache[:, :, :, index * PART : (index + 1) * PART])


def merged(results):
    """Of every shard's output and log-sum-exp; where a shard has no key its output is 0."""
    outs, lses = (
        np.stack([np.asarray(x, np.float64) for x in xs]) for xs in zip(*results, strict=True)
    )
    assert (outs[np.isneginf(lses)] == 0).all()
    assert not np.isnan(lses).any()
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(lses).sum(0))
        weights = np.exp(lses - np.where(np.isneginf(lse), 0, lse))
    return (weights[..., None] * outs).sum(0).astype(np.float32), lse.astype(np.float32)


def prefill(name, geometry, slices, plan=None):
    """Slices, dense or by the plan of a shard, whose mask of the whole [N, T, S] comes with it."""
    rng = np.random.default_rng(0)
    table = rng.permutation(np.arange(1, PAGES + 1)).astype(np.int32)
    flat = rng.standard_normal((2, S, K, H)).astype(DTYPE)
    views = 1 if geometry is None else 3
    queries = jnp.asarray(rng.standard_normal((views, T, N, H)), DTYPE)
    attend = function("prefill", name)
    if name == "mosaic_tpu":
        attend = functools.partial(attend, tiles=Tiles(q=128 * N, k=128), step=128)

    @jax.jit
    def run(kv, start, length, index, plan):
        return attend(
            *(queries, kv, jnp.int32(LAYER), jnp.asarray(table), start, length),
            geometry=geometry,
            plan=plan,
            shard=Shard(index, PART, COUNT),
        )

    for start, length in slices:
        caches = [paged(table[None], [x[: start + length]]) for x in flat]
        plans, mask = plan(start, length) if plan else ([None] * COUNT, None)
        numbers = jnp.int32(start), jnp.int32(length)
        out, lse = merged(
            run(PagedKV(*(cut(cache, i) for cache in caches)), *numbers, jnp.int32(i), plans[i])
            for i in range(COUNT)
        )
        expected, expected_lse = oracle.attention(queries, *flat, start, length, geometry, mask)
        out, lse, expected, expected_lse = (x[:length] for x in (out, lse, expected, expected_lse))
        seen = np.isfinite(expected_lse)
        assert (np.isfinite(lse) == seen).all()
        assert (out[~seen] == 0).all()
        if seen.any():
            assert_close(out, expected, LIMIT[DTYPE.name])
            assert_close(lse[seen], expected_lse[seen])


# One key; a border of parts; a border of chunks; the end, to which whole steps lie in one view.
SLICES = (0, 1), (PART - 2, 3), (1000, T), (S - T - 9, T)


@each_backend
@each_geometry
def test_dense_prefill_of_all_shards_is_that_of_the_whole(name, geometry):
    prefill(name, geometry, SLICES)


BLOCK, Q_TILE, COLUMNS = 16, 24, 256


def random_plan(start, length):
    """A plan for each shard, and the mask of the whole that they make."""
    rng, end = np.random.default_rng(start), start + length
    tile = np.arange(-(-T // Q_TILE))
    last = np.minimum((tile + 1) * Q_TILE, length) - 1 + start
    reads = rng.random((N, len(tile), S // BLOCK)) < 0.5
    reads &= np.arange(S // BLOCK) * BLOCK <= last[:, None]
    reads &= (tile * Q_TILE < length)[:, None]
    columns = rng.random((N, S)) < 0.4
    columns[:, end:] = False
    mask = (reads.repeat(BLOCK, 2) | columns[:, None]).repeat(Q_TILE, 1)[:, :T]

    def of_shard(index):
        def own(x, unit):
            parts = x.reshape(*x.shape[:-1], PAGES, COUNT, PART // unit)
            return parts[..., index, :].reshape(*x.shape[:-1], -1)

        bits = own(reads, BLOCK)
        bits = np.pad(bits, ((0, 0), (0, 0), (0, -bits.shape[2] % 32)))
        listed = np.full((N, COLUMNS), ABSENT, np.int32)
        for row, chosen in zip(listed, map(np.flatnonzero, own(columns, 1)), strict=True):
            row[: len(chosen)] = chosen
        blocks = np.packbits(bits, axis=2, bitorder="little").view(np.uint32)
        return SparsePlan(jnp.asarray(blocks), jnp.asarray(listed), Tiles(Q_TILE, BLOCK))

    return [of_shard(i) for i in range(COUNT)], mask


@each_backend
@each_geometry
def test_prefill_by_plans_of_all_shards_is_that_by_their_sum(name, geometry):
    prefill(name, geometry, ((PART - 2, 1), (S - T - 9, T)), random_plan)


def after(position, count=1):
    return list(range(position, position + count))


@each_backend
@each_geometry
def test_decode_of_all_shards_is_that_of_the_whole(name, geometry):
    rng = np.random.default_rng(2)
    rows = [after(0), [], after(PART - 2, 4), after(PAGE - 1), [], after(990), after(1006, 3)]
    rows.append(after(S - 34, 2))
    B, Q = len(rows), max(map(len, rows))
    positions = np.array([[*row, *[-1] * (Q - len(row))] for row in rows], np.int32)
    lens = positions.max(1) + 1
    tables = rng.permutation(np.arange(1, B * PAGES + 1)).reshape(B, PAGES).astype(np.int32)
    flats = [rng.standard_normal((2, n, K, H)).astype(np.float32) for n in lens]
    caches = [paged(tables, [flat[i] for flat in flats]) for i in range(2)]
    # To read a page that is not there is an error.
    tables[np.arange(PAGES) >= -(-lens[:, None] // PAGE)] = NOWHERE
    views = 1 if geometry is None else 3
    queries = jnp.asarray(rng.standard_normal((views, B, Q, N, H)), jnp.float32)
    attend = function("decode", name)
    if name == "mosaic_tpu":
        attend = functools.partial(attend, block_bytes=128 * K * H * 4)

    @jax.jit
    def run(kv, index):
        return attend(
            *(queries, kv, jnp.int32(LAYER), jnp.asarray(tables), jnp.asarray(positions)),
            geometry=geometry,
            shard=Shard(index, PART, COUNT),
        )

    out, lse = merged(
        run(PagedKV(*(cut(cache, i) for cache in caches)), jnp.int32(i)) for i in range(COUNT)
    )
    assert (out[positions < 0] == 0).all()
    assert np.isneginf(lse[positions < 0]).all()
    for b, row in enumerate(rows):
        if row:
            given = queries[:, b], *flats[b], row[0], len(row), geometry
            for found, wanted in zip((out, lse), oracle.attention(*given), strict=True):
                assert_close(found[b, : len(row)], wanted[: len(row)])


def vote(name, geometry, *, part, count, slices, R=20):
    pages, page = 2, part * count
    end_of_all = pages * page
    rng = np.random.default_rng(3)
    cast = functools.partial(function("select", name), geometry=geometry)
    if name == "mosaic_tpu":
        cast = functools.partial(cast, tile=128)
    views = 1 if geometry is None else 3
    queries = jnp.asarray(rng.standard_normal((views, R, N, H)) * 6 / H, jnp.float32)
    table = np.array([2, 1], np.int32)

    @jax.jit
    def run(keys, start, length):
        def local(index, keys):
            shard = Shard(index, part, count, "shards")
            cache = PagedKV(keys, keys)
            args = queries, cache, jnp.int32(LAYER), jnp.asarray(table), start, length
            return cast(*args, shard=shard)

        return jax.vmap(local, axis_name="shards")(jnp.arange(count, dtype=jnp.int32), keys)

    for start, length in slices:
        end = start + length
        flat = rng.standard_normal((end_of_all, K, H)).astype(np.float32)
        flat[end:] = np.nan
        cache = np.full((2, K, pages + 1, page, H), np.nan, np.float32)
        for number in range(pages):
            cache[LAYER, :, table[number]] = flat[number * page : (number + 1) * page].swapaxes(
                0, 1
            )
        cuts = np.stack(np.split(cache, count, axis=3))
        sums = run(jnp.asarray(cuts), jnp.int32(start), jnp.int32(length))
        expected = sparse_oracle.votes(queries, flat, start, length, geometry)
        for found, wanted in zip(sums, expected, strict=True):
            found = np.asarray(found).reshape(count, N, pages, part)
            found = found.transpose(1, 2, 0, 3).reshape(N, -1)
            assert_close(found[:, :end], wanted)
            assert (found[:, end:] == 0).all()


@each_backend
@each_geometry
def test_votes_of_all_shards_are_those_of_the_whole(name, geometry):
    slices = (0, 1), (125, 6), (380, 13), (500, 140)
    vote(name, geometry, part=128, count=3, slices=slices)
