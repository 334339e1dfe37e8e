"""Plans of a head over a whole prompt, drawn at random, and the pairs that they read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import plan as plans
from pallas_kernels.dispatch.tiles import Tiles
from qwen_jax.eval.plan_picture import PlanPicture


def random_picture(rng, tokens, slice_len, tiles, *, chunk_len=None, stop=None, columns=12):
    """Slices that end at borders of chunks; queries from `stop` on are in none."""
    stop = tokens if stop is None else stop
    # Compiled once for all slices of a picture.
    build = jax.jit(
        functools.partial(plans.build, num_queries=slice_len, num_columns=columns, tiles=tiles)
    )
    slices, start = [], 0
    while start < stop:
        room = chunk_len - start % chunk_len if chunk_len else stop
        length = min(slice_len, stop - start, room)
        end = start + length
        verticals, slashes = np.zeros((2, 1, tokens), bool)
        verticals[0, rng.permutation(end)[:columns]] = True
        slashes[0, rng.permutation(end)[:3]] = True
        plan = build(
            jnp.asarray(verticals),
            jnp.asarray(slashes),
            jnp.int32(start),
            jnp.int32(length),
        )
        slices.append((start, length, plan))
        start = end
    return PlanPicture(
        tokens=tokens,
        tiles=tiles,
        slices=tuple(slices),
        chunk_len=chunk_len,
        layer=2,
        head=5,
        vertical=columns,
        slash=3,
        density=0.25,
        recall=0.875,
    )


@functools.cache
def small_picture():
    return random_picture(
        np.random.default_rng(3), 200, 64, Tiles(q=16, k=8), chunk_len=90, stop=190
    )


def pairs(picture):
    """Pairs [T, T] read with whole blocks, and those read at all, from `to_mask`."""
    T = picture.tokens
    every, by_block = np.zeros((2, T, T), bool)
    for start, length, plan in picture.slices:
        no_columns = jnp.full_like(plan.columns, plans.ABSENT)
        for mask, each in (
            (every, plan),
            (by_block, plans.SparsePlan(plan.blocks, no_columns, plan.tiles)),
        ):
            found = plans.to_mask(each, jnp.int32(start), jnp.int32(length), num_keys=T)
            mask[start : start + length] = np.asarray(found)[0, :length]
    return by_block, every
