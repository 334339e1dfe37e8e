"""A plan in pixels: equal to its mask, pooled."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support.plan_pictures import pairs, random_picture, small_picture

from pallas_kernels import plan as plans
from pallas_kernels.dispatch.tiles import Tiles
from qwen_jax.eval import plan_picture
from qwen_jax.eval.plan_picture import Raster, colours, rasterise


def pooled(mask, rows, columns):
    """Share of the causal pairs in each pixel, by looking at every pair of it."""
    T = len(mask)
    causal = np.tril(np.ones((T, T), bool))
    shares = np.full((rows, columns), np.nan)
    for row in range(rows):
        q = slice(row * T // rows, (row + 1) * T // rows)
        for column in range(columns):
            k = slice(column * T // columns, (column + 1) * T // columns)
            if causal[q, k].any():
                shares[row, column] = (mask & causal)[q, k].sum() / causal[q, k].sum()
    return shares


@pytest.mark.parametrize(
    ("tiles", "chunk_len"),
    [
        (Tiles(q=16, k=8), None),
        (Tiles(q=8, k=16), 90),
        (Tiles(q=5, k=7), 64),
        (Tiles(q=1, k=1), 50),
    ],
)
def test_pixels_are_the_pooled_mask(tiles, chunk_len):
    rng = np.random.default_rng(4)
    picture = random_picture(rng, 200, 64, tiles, chunk_len=chunk_len, stop=190)
    by_block, every = pairs(picture)
    finest = rasterise(picture, 1000, 1000)  # a pixel is a token
    causal = np.tril(np.ones((200, 200), bool))
    np.testing.assert_array_equal(finest.blocks, np.where(causal, by_block, np.nan))
    np.testing.assert_array_equal(finest.columns, np.where(causal, every & ~by_block, np.nan))
    for rows, columns in ((37, 37), (20, 50), (7, 3), (1, 1)):
        raster = rasterise(picture, rows, columns)
        np.testing.assert_allclose(raster.blocks, pooled(by_block, rows, columns), atol=1e-12)
        np.testing.assert_allclose(
            raster.blocks + raster.columns, pooled(every, rows, columns), atol=1e-12
        )


def test_a_plan_that_reads_all_is_full_and_queries_without_one_are_empty():
    picture = small_picture()
    heads = jnp.ones(1, bool)
    full = [
        (start, length, plans.everything(plan, heads, jnp.int32(start), jnp.int32(length)))
        for start, length, plan in picture.slices
    ]
    raster = rasterise(dataclasses.replace(picture, slices=tuple(full)), 20, 20)
    causal = np.tril(np.ones((20, 20), bool))
    assert (raster.blocks[:19][causal[:19]] == 1).all()
    assert (raster.blocks[19] == 0).all()  # queries 190 to 200
    assert (np.isnan(raster.blocks) == ~causal).all()
    assert np.nansum(raster.columns) == 0


def test_what_is_read_is_seen_and_what_is_not_stays_white():
    shares = np.array([[0.0, 1e-6, 0.2, 1.0, np.nan]])
    zero = np.zeros_like(shares)
    for blocks, columns, strongest in (
        (shares, zero, plan_picture.BLOCKS),
        (zero, shares, plan_picture.COLUMNS),
    ):
        image = colours(Raster(blocks=blocks, columns=columns))[0].astype(int)
        darkness = 255 * 3 - image.sum(-1)
        assert darkness[0] == darkness[4] == 0
        assert darkness[1] > 60
        assert (np.diff(darkness[:4]) > 0).all()
        assert tuple(image[3]) == strongest


def test_a_long_prompt_takes_pixels_not_pairs():
    """A mask of 65,536 tokens would take 4 GiB."""
    rng = np.random.default_rng(5)
    picture = random_picture(rng, 1 << 16, 1 << 14, Tiles(q=256, k=64), columns=100)
    raster = rasterise(picture, 100, 100)
    assert raster.blocks.shape == (100, 100)
    assert np.nanmax(raster.blocks + raster.columns) <= 1
    plan = picture.slices[-1][2]
    column = int(plan.columns[0, 0])
    assert raster.columns[-1, column * 100 >> 16] > 0
