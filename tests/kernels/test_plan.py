import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sparse_oracle

from pallas_kernels import plan as plans
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry

S, T, V = 96, 40, 24
GEOMETRIES = (None, ChunkGeometry(50, 10), ChunkGeometry(19, 3), ChunkGeometry(60, 4))


@functools.cache
def builder(tiles):
    def build(verticals, slashes, start, length):
        plan = plans.build(
            verticals, slashes, start, length, num_queries=T, num_columns=V, tiles=tiles
        )
        mask = plans.to_mask(plan, start, length, num_keys=S)
        return plan, mask[:, :T], plans.density(plan, start, length)

    return jax.jit(build)


def random_piece(rng, geometry):
    """A piece inside one chunk, and what is selected for it."""
    start = int(rng.integers(0, S - 1))
    room = S - start if geometry is None else geometry.chunk_len - start % geometry.chunk_len
    length = int(rng.integers(1, min(room, S - start, T) + 1))
    end = start + length
    columns = rng.permutation(end)[: rng.integers(0, V + 1)]
    diagonals = rng.permutation(end)[: rng.integers(0, 6)]
    return start, length, np.sort(columns), np.sort(diagonals)


def as_mask(positions):
    mask = np.zeros((1, S), bool)
    mask[0, positions] = True
    return mask


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tiles_of_one_read_exactly_what_the_regions_select(geometry):
    rng = np.random.default_rng(2)
    build = builder(Tiles(q=1, k=1))
    for _ in range(100):
        start, length, columns, diagonals = random_piece(rng, geometry)
        _, mask, _ = build(as_mask(columns), as_mask(diagonals), start, length)
        expected = sparse_oracle.cells(columns, diagonals, start, length, geometry)
        np.testing.assert_array_equal(mask[0, :length, : start + length], expected)
        assert not np.asarray(mask)[0, length:].any()


@pytest.mark.parametrize("tiles", [Tiles(q=8, k=8), Tiles(q=16, k=4), Tiles(q=5, k=8)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_blocks_are_those_that_the_windows_of_the_regions_touch(geometry, tiles):
    rng = np.random.default_rng(3)
    for _ in range(30):
        start, length, columns, diagonals = random_piece(rng, geometry)
        plan, mask, density = builder(tiles)(as_mask(columns), as_mask(diagonals), start, length)
        expected = sparse_oracle.blocks(diagonals, start, length, geometry, tiles.q, tiles.k)
        reads = np.asarray(plan.reads())[0]
        np.testing.assert_array_equal(reads[: len(expected), : expected.shape[1]], expected)
        assert reads.sum() == expected.sum()
        # Nothing selected is lost, and no column is anywhere but in its place.
        lost = sparse_oracle.cells(columns, diagonals, start, length, geometry)
        lost &= ~np.asarray(mask)[0, :length, : start + length]
        assert not lost.any()
        assert plan.columns[0].tolist() == [*columns, *[plans.ABSENT] * (V - len(columns))]
        assert density[0] == pytest.approx(count(expected, columns, start, length, tiles), 1e-6)


def count(blocks, columns, start, length, tiles):
    """Kept pairs over all, by counting."""
    kept = dense = 0
    for tile, reads in enumerate(blocks):
        rows = min(tiles.q, length - tile * tiles.q)
        final = start + tile * tiles.q + rows - 1
        single = sum(1 for c in columns if c <= final and not reads[c // tiles.k])
        kept += rows * (reads.sum() * tiles.k + single)
        dense += rows * (final // tiles.k + 1) * tiles.k
    return kept / dense


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_more_budget_never_reads_less_and_all_of_it_reads_all(data):
    start = data.draw(st.integers(0, S - 1), "start")
    length = data.draw(st.integers(1, min(T, S - start)), "length")
    end = start + length
    columns = data.draw(st.sets(st.integers(0, end - 1), max_size=V), "columns")
    diagonals = data.draw(st.sets(st.integers(0, end - 1)), "diagonals")
    fewer = data.draw(st.sets(st.sampled_from(sorted(diagonals or {0}))), "fewer") & diagonals
    build = builder(Tiles(q=8, k=4))
    _, more, dense = build(as_mask(sorted(columns)), as_mask(sorted(diagonals)), start, length)
    _, less, sparse = build(as_mask([]), as_mask(sorted(fewer)), start, length)
    assert not (np.asarray(less) & ~np.asarray(more)).any()
    assert 0 <= sparse[0] <= dense[0] <= 1
    _, everything, full = build(as_mask([]), as_mask(range(end)), start, length)
    causal = np.arange(S) <= start + np.arange(T)[:, None]
    np.testing.assert_array_equal(everything[0], causal & (np.arange(T) < length)[:, None])
    assert full[0] == 1


def test_a_million_positions_and_their_plan_stay_small():
    S, T, heads, tiles = 2**20, 32768, 28, Tiles(q=128, k=128)
    mask = jax.ShapeDtypeStruct((heads, S), bool)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)

    def build(*args):
        plan = plans.build(*args, num_queries=T, num_columns=22032, tiles=tiles)
        return plan.blocks, plan.columns

    blocks, columns = jax.eval_shape(build, mask, mask, scalar, scalar)
    bytes_a_tile = blocks.shape[2] * blocks.dtype.itemsize
    assert bytes_a_tile == S // tiles.k // 8  # all that a kernel holds of it at a time
    assert blocks.shape == (heads, T // tiles.q, bytes_a_tile // 4)
    assert columns.shape == (heads, 22032)


def test_positions_beyond_sixteen_bits():
    S, tiles = 2**18, Tiles(q=128, k=128)
    start, length = S - 200, 200
    verticals, slashes = np.zeros((2, 1, S), bool)
    verticals[0, [3, 70_000, S - 1]] = True
    slashes[0, [66_000, S - 1]] = True
    build = functools.partial(plans.build, num_queries=200, num_columns=5, tiles=tiles)
    plan = jax.jit(build)(verticals, slashes, start, length)
    assert plan.columns[0, :3].tolist() == [3, 70_000, S - 1]
    expected = sparse_oracle.blocks([66_000, S - 1], start, length, None, 128, 128)
    np.testing.assert_array_equal(np.asarray(plan.reads())[0, :, : S // 128], expected)


@pytest.mark.parametrize("blocks", [31, 32, 70])
def test_blocks_before_a_block_and_tiles_that_cover_a_column_are_those_of_the_bits(blocks):
    rng = np.random.default_rng(blocks)
    reads = rng.random((2, 37, -(-blocks // 32) * 32)) < 0.4
    reads[..., blocks:] = False
    words = np.packbits(reads, axis=2, bitorder="little").view(np.uint32)
    columns = np.sort(rng.integers(0, 8 * blocks, (2, V))).astype(np.int32)
    plan = plans.SparsePlan(jnp.asarray(words), jnp.asarray(columns), Tiles(q=4, k=8))
    stops = rng.integers(0, reads.shape[2] + 1, (2, 37, 3)).astype(np.int32)
    upto = np.pad(reads.cumsum(2), ((0, 0), (0, 0), (1, 0)))
    assert (np.asarray(plan.before(jnp.asarray(stops))) == np.take_along_axis(upto, stops, 2)).all()
    bits = np.asarray(plans.covered(plan, plan.columns))
    tile = np.arange(37)
    covered = bits[:, tile // 32] >> (tile % 32).astype(np.uint32)[:, None] & 1
    expected = np.take_along_axis(reads, np.broadcast_to((columns // 8)[:, None], (2, 37, V)), 2)
    assert (covered == expected).all()
