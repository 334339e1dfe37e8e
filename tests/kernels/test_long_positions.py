"""Selection, plans and sparse prefill at a million tokens and in caches beyond 2^31 elements."""

import functools
import math
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import sparse_oracle
from support.tolerances import assert_close

from pallas_kernels import plan as plans
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.prefill import prefill
from pallas_kernels.select import select
from pallas_kernels.select.xla import vote

pytestmark = pytest.mark.optimized

PUBLISHED = ChunkGeometry(chunk_size=262144, local_size=8192)


@functools.partial(jax.jit, static_argnames=("geometry", "num_columns", "tiles"))
def sparse_slice(
    queries, voters, cache, layer, table, start, length, budgets, *, geometry, num_columns, tiles
):
    where = layer, table, start, length
    found = select(voters, cache, *where, *budgets, geometry=geometry)
    plan = plans.build(
        *found, start, length, num_queries=queries.shape[1], num_columns=num_columns, tiles=tiles
    )
    out, lse = prefill(queries, cache, *where, geometry=geometry, plan=plan)
    return vote(voters, cache, *where, geometry=geometry), found, out, lse


def expected_row(query, row, start, keys, values, read, geometry):
    """Output and log-sum-exp of query [views, H] over the keys [S, H] that are read."""
    view = np.minimum((start + row) // geometry.chunk_len - read // geometry.chunk_len, 2)
    query, keys = np.asarray(query, np.float64), np.asarray(keys[read], np.float64)
    scores = np.einsum("sh,sh->s", query[view], keys)
    weights = np.exp(scores - scores.max())
    out = weights @ np.asarray(values[read], np.float64) / weights.sum()
    return out, scores.max() + np.log(weights.sum())


def reads_of(columns, diagonals, start, length, geometry, tiles):
    """Pairs [length, end] of a piece: whole blocks of its tiles, and columns."""
    blocks = sparse_oracle.blocks(diagonals, start, length, geometry, tiles.q, tiles.k)
    reads = blocks.repeat(tiles.q, 0)[:length].repeat(tiles.k, 1)[:, : start + length]
    reads[:, columns] = True
    return reads & (np.arange(start + length) <= start + np.arange(length)[:, None])


def test_the_last_slice_of_a_million_tokens():
    rng = np.random.default_rng(0)
    start, length, T, N, H, page = 1_000_003, 150, 160, 2, 16, 1024
    end, tiles, num_columns = start + length, Tiles(q=64, k=64), 3500
    pages = -(-end // page)
    table = rng.permutation(pages).astype(np.int32)
    flat = rng.standard_normal((2, pages * page, H), np.float32)
    flat[:, end:] = np.nan
    cache = np.empty((2, 1, 1, pages, page, H), np.float32)
    cache[:, 0, 0, table] = flat.reshape(2, pages, page, H)
    queries = rng.standard_normal((3, T, N, H), np.float32)
    voters = rng.standard_normal((3, 8, N, H), np.float32)
    budgets = np.array([[1000, num_columns], [6096, 100]], np.int32)
    votes, found, out, lse = sparse_slice(
        jnp.asarray(queries),
        jnp.asarray(voters),
        PagedKV(*map(jnp.asarray, cache)),
        jnp.int32(0),
        jnp.asarray(table),
        jnp.int32(start),
        jnp.int32(length),
        tuple(map(jnp.asarray, budgets)),
        geometry=PUBLISHED,
        num_columns=num_columns,
        tiles=tiles,
    )
    chosen = [[np.asarray(mask[n]).nonzero()[0] for n in range(N)] for mask in found]
    expected = sparse_oracle.piece_votes(voters, flat[0, :end, None], start, length, PUBLISHED)
    forced = np.arange(30), np.arange(end - 100, end)
    for kind in range(2):
        assert_close(np.asarray(votes[kind])[:, :end], expected[kind], 4e-6)
        for n in range(N):
            sparse_oracle.assert_largest(
                chosen[kind][n], expected[kind][n], budgets[kind, n], forced[kind], 1e-4
            )
    out, lse = np.asarray(out), np.asarray(lse)
    for n in range(N):
        reads = reads_of(chosen[0][n], chosen[1][n], start, length, PUBLISHED, tiles)
        for row in (0, 63, 64, 100, 149):
            read = reads[row].nonzero()[0]
            assert len(read) < 0.6 * end
            assert read[0] < 2**16 < 10**6 < read[-1]
            right, right_lse = expected_row(
                queries[:, row, n], row, start, *flat[:, :end], read, PUBLISHED
            )
            assert_close(out[row, n], right, 4e-6)
            assert abs(lse[row, n] - right_lse) <= 4e-6


def test_a_cache_of_more_than_2_to_the_32_elements_is_read_at_its_end():
    """A file of zeros that were never written needs no memory."""
    shape = L, K, pages, page, H = 28, 4, 4_800, 64, 128
    assert math.prod(shape) > 2**32
    geometry = ChunkGeometry(chunk_size=160, local_size=32)
    rng = np.random.default_rng(1)
    table = np.append(rng.integers(pages - 1000, pages - 1, 7), pages - 1).astype(np.int32)
    N, T, S = 8, 32, len(table) * page
    flat = rng.standard_normal((2, S, K, H), np.float32)
    start, length = S - 27, 27
    queries = rng.standard_normal((3, T, N, H), np.float32) * np.float32(H**-0.5)
    tiles, budgets = Tiles(q=16, k=16), np.array([N * [35], N * [105]], np.int32)
    with tempfile.TemporaryFile() as file:
        cache = np.memmap(file, np.float32, "w+", shape=(2, *shape))
        for part, content in zip(cache, flat, strict=True):
            part[-1][:, table] = content.reshape(-1, page, K, H).transpose(2, 0, 1, 3)
        _, found, out, lse = sparse_slice(
            jnp.asarray(queries),
            jnp.asarray(queries[:, length - 16 : length]),
            PagedKV(*(jax.device_put(part) for part in cache)),
            jnp.int32(L - 1),
            jnp.asarray(table),
            jnp.int32(start),
            jnp.int32(length),
            tuple(map(jnp.asarray, budgets)),
            geometry=geometry,
            num_columns=35,
            tiles=tiles,
        )
        found, out, lse = jax.tree.map(np.asarray, (found, out, lse))
    for n in range(N):
        columns, diagonals = (mask[n].nonzero()[0] for mask in found)
        reads = reads_of(columns, diagonals, start, length, geometry, tiles)
        for row in range(length):
            read = reads[row].nonzero()[0]
            right, right_lse = expected_row(
                queries[:, row, n], row, start, *flat[:, :, n // 2], read, geometry
            )
            assert_close(out[row, n], right)
            assert abs(lse[row, n] - right_lse) <= 1e-5


def test_a_selection_of_a_million_keys_holds_votes_and_no_scores():
    L, N, K, H, page, pages = 28, 28, 4, 128, 1024, 1024
    S, last_q = page * pages, 64
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

    def run(queries, keys, *rest):
        return select(queries, PagedKV(keys, keys), *rest, geometry=PUBLISHED)

    compiled = (
        jax.jit(run)
        .lower(
            jax.ShapeDtypeStruct((3, last_q, N, H), jnp.float32),
            jax.ShapeDtypeStruct((L, K, pages, page, H), jnp.float32),
            integers(()),
            integers((pages,)),
            integers(()),
            integers(()),
            integers((N,)),
            integers((N,)),
        )
        .compile()
        .memory_analysis()
    )
    votes = N * S * 4
    scores = last_q * votes
    assert compiled.temp_size_in_bytes < 10 * votes < scores / 6


@pytest.mark.parametrize("heads", [28, 40])
def test_the_plan_of_a_tile_is_kilobytes(heads):
    S, T, tiles = 2**20, 32768, Tiles(q=256, k=64)
    mask = jax.ShapeDtypeStruct((heads, S), bool)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)

    def build(*args):
        plan = plans.build(*args, num_queries=T, num_columns=22032, tiles=tiles)
        return plan.blocks, plan.columns

    lowered = jax.jit(build).lower(mask, mask, scalar, scalar)
    blocks, columns = lowered.out_info
    assert blocks.shape == (heads, T // tiles.q, S // tiles.k // 32)
    row_of_tiles = heads * blocks.shape[2] * blocks.dtype.itemsize
    assert row_of_tiles < 2**20 / 10
    assert columns.shape == (heads, 22032)
    built = lowered.compile().memory_analysis()
    assert built.temp_size_in_bytes < 8 * heads * S * 4
