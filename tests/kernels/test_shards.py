"""Kernels on shards of a cache: their results, merged, are those of the whole in float64.

One process stands in for all devices. Attention runs once for each shard; the vote, in which
shards talk to each other, runs for all of them in `vmap`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sparse_oracle
from jax.experimental.pallas import tpu as pltpu
from tolerances import assert_close

from pallas_kernels import backend
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.plan import ABSENT, SparsePlan
from pallas_kernels.shard import Shard
from pallas_kernels.tiles import Tiles

LAYER, NOWHERE = 1, 2**30
PART, PAGES = 32, 4
K, N, H, T = 1, 2, 16, 40
GEOMETRIES = {
    "one window": None,
    "borders inside parts": ChunkGeometry(chunk_size=120, local_size=50),
    "borders between parts": ChunkGeometry(chunk_size=80, local_size=16),
    "chunks smaller than a part": ChunkGeometry(chunk_size=30, local_size=19),
}
INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
OPTIONS = {
    "mosaic_tpu": {"interpret": INTERPRET},
    "xla": {},
    "reference": {},
}
each_backend = pytest.mark.parametrize("name", OPTIONS)
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


def function(operation, name):
    implementation = getattr(backend.load(operation, name), backend.FUNCTIONS[operation])
    return functools.partial(implementation, **OPTIONS[name])


def paged(rng, tables, flats, page):
    """Sequences [n, K, H] in a cache that holds nan everywhere else."""
    cache = np.full((2, K, tables.size + 1, page, H), np.nan, np.float32)
    for table, flat in zip(tables, flats, strict=True):
        for s in range(len(flat)):
            cache[LAYER, :, table[s // page], s % page] = flat[s]
    return cache


def cut(cache, index, count):
    part = cache.shape[3] // count
    return jnp.asarray(cache[:, :, :, index * part : (index + 1) * part])


def merged(results):
    """Of every shard's output and log-sum-exp; where a shard has no key its output is 0."""
    outs, lses = (np.stack([np.asarray(x, np.float64) for x in xs]) for xs in zip(*results, strict=True))
    assert (outs[np.isneginf(lses)] == 0).all()
    assert not np.isnan(lses).any()
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(lses).sum(0))
        weights = np.exp(lses - np.where(np.isneginf(lse), 0, lse))
    return (weights[..., None] * outs).sum(0).astype(np.float32), lse.astype(np.float32)


# A single key; a border of parts, of pages; the end.
SLICES = (0, 1), (PART - 2, 3), (0, T), (4 * PART - 1, 2), (9 * PART + 7, T)


def prefill(name, geometry, count, *, reads=None, columns=None):
    """All `SLICES`, dense or by blocks [N, tiles, blocks] and columns of each head."""
    page, rng = count * PART, np.random.default_rng(count)
    S = PAGES * page
    table = rng.permutation(np.arange(1, PAGES + 1)).astype(np.int32)
    flat = rng.standard_normal((2, S, K, H)).astype(np.float32)
    views = 1 if geometry is None else 3
    queries = jnp.asarray(rng.standard_normal((views, T, N, H)), jnp.float32)
    attend = function("prefill", name)
    if name == "mosaic_tpu":
        attend = functools.partial(attend, tiles=Tiles(q=128 * N, k=128), step=128)

    @jax.jit
    def run(keys, values, start, length, index, plan):
        return attend(
            *(queries, keys, values, jnp.int32(LAYER), jnp.asarray(table), start, length),
            geometry=geometry,
            plan=plan,
            shard=Shard(index, PART, count, None),
        )

    for start, length in SLICES:
        end = start + length
        caches = [paged(rng, table[None], [x[:end]], page) for x in flat]
        mask = None
        if reads is not None:
            mask = in_plan(reads, columns, start, length)
        results = [
            run(
                *(cut(cache, i, count) for cache in caches),
                *(jnp.int32(x) for x in (start, length, i)),
                None if reads is None else local_plan(reads, columns, start, length, i, count),
            )
            for i in range(count)
        ]
        out, lse = merged([(out[:length], lse[:length]) for out, lse in results])
        expected, expected_lse = oracle.attention(queries, *flat, start, length, geometry, mask)
        expected, expected_lse = expected[:length], expected_lse[:length]
        seen = np.isfinite(expected_lse)
        assert (np.isfinite(lse) == seen).all()
        assert (out[~seen] == 0).all()
        if seen.any():
            assert_close(out, expected)
            assert_close(lse[seen], expected_lse[seen])


@each_backend
@each_geometry
def test_dense_prefill_of_all_shards_is_that_of_the_whole(name, geometry):
    prefill(name, geometry, 3)


BLOCK, Q_TILE, COLUMNS = 8, 24, 20


def blocks_before(reads, start, length):
    """Reads without the blocks that begin after a tile's last query, or of tiles of padding."""
    reads = reads.copy()
    for tile in range(reads.shape[1]):
        last = start + min((tile + 1) * Q_TILE, length) - 1
        reads[:, tile, last // BLOCK + 1 if tile * Q_TILE < length else 0 :] = False
    return reads


def in_plan(reads, columns, start, length):
    """The pairs [N, T, S] that a plan of the whole reads."""
    blocks = blocks_before(reads, start, length)
    mask = blocks.repeat(BLOCK, 2).repeat(Q_TILE, 1)[:, :T]
    for n, chosen in enumerate(columns):
        mask[n][:, chosen[chosen < start + length]] = True
    return mask


def local_plan(reads, columns, start, length, index, count):
    """What a shard reads of a plan of the whole, in local blocks and columns."""
    reads = blocks_before(reads, start, length)
    N, tiles, _ = reads.shape
    own = reads.reshape(N, tiles, -1, count, PART // BLOCK)[:, :, :, index].reshape(N, tiles, -1)
    own = np.pad(own, ((0, 0), (0, 0), (0, -own.shape[2] % 32)))
    blocks = np.packbits(own, axis=2, bitorder="little").view(np.uint32)
    listed = np.full((N, COLUMNS), ABSENT, np.int32)
    for n, chosen in enumerate(columns):
        chosen = chosen[chosen < start + length]
        chosen = chosen[chosen // PART % count == index]
        listed[n, : len(chosen)] = chosen // (count * PART) * PART + chosen % PART
    return SparsePlan(jnp.asarray(blocks), jnp.asarray(listed), Tiles(Q_TILE, BLOCK))


@each_backend
@each_geometry
def test_prefill_by_plans_of_all_shards_is_that_by_one_of_the_whole(name, geometry):
    rng, S = np.random.default_rng(1), PAGES * 3 * PART
    reads = rng.random((N, -(-T // Q_TILE), S // BLOCK)) < 0.2
    reads[0, :, ::2] = False
    columns = [np.sort(rng.permutation(S)[:COLUMNS]) for _ in range(N)]
    prefill(name, geometry, 3, reads=reads, columns=columns)


def after(position, count=1):
    return list(range(position, position + count))


@each_backend
@each_geometry
def test_decode_of_all_shards_is_that_of_the_whole(name, geometry):
    count, rng = 3, np.random.default_rng(2)
    page = count * PART
    rows = [
        *[after(0), [], after(PART - 2, 4), after(page - 1, 2), after(140, 3), [], after(3 * page)],
        *[after(3 * page + 2 * PART - 4, 4)],
    ]
    B, Q = len(rows), max(map(len, rows))
    positions = np.array([[*row, *[-1] * (Q - len(row))] for row in rows], np.int32)
    lens = positions.max(1) + 1
    tables = rng.permutation(np.arange(1, B * PAGES + 1)).reshape(B, PAGES).astype(np.int32)
    flats = [rng.standard_normal((2, n, K, H)).astype(np.float32) for n in lens]
    caches = [paged(rng, tables, [flat[i] for flat in flats], page) for i in range(2)]
    # To read a page that is not there is an error.
    tables[np.arange(PAGES) >= -(-lens[:, None] // page)] = NOWHERE
    views = 1 if geometry is None else 3
    queries = jnp.asarray(rng.standard_normal((views, B, Q, N, H)), jnp.float32)

    @jax.jit
    def run(keys, values, index):
        return function("decode", name)(
            *(queries, keys, values, jnp.int32(LAYER), jnp.asarray(tables), jnp.asarray(positions)),
            geometry=geometry,
            shard=Shard(index, PART, count, None),
        )

    results = [run(*(cut(cache, i, count) for cache in caches), jnp.int32(i)) for i in range(count)]
    out, lse = merged(results)
    assert (out[positions < 0] == 0).all()
    assert np.isneginf(lse[positions < 0]).all()
    for b, row in enumerate(rows):
        if row:
            given = queries[:, b], *flats[b], row[0], len(row), geometry
            for found, wanted in zip((out, lse), oracle.attention(*given), strict=True):
                assert_close(found[b, : len(row)], wanted[: len(row)])
