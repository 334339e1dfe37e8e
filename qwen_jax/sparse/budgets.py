"""Budgets of sparse prefill as arrays on the device, and the report of a sparse slice."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch.tiles import Tiles
from qwen_jax.config import SparseConfig

TILES = Tiles(q=1024, k=64)
"""Default tile sizes of plans, in tokens; shorter key blocks read fewer unselected keys."""
TPU_TILES = Tiles(q=1024, k=128)
"""Tile sizes of plans on a TPU, which copies key blocks one by one and is slow on short ones."""
GPU_TILES = Tiles(q=128, k=64)
"""Tile sizes of plans on a GPU: one program per tile; more queries read more keys of others."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vertical", "slash", "least_recall"],
    meta_fields=["last_q", "num_columns", "tiles"],
)
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Budgets of every head, as arrays that a loop over layers can index.

    Attributes:
        vertical: number of key columns.
        slash: number of diagonals.
        least_recall: minimum attention recall per head; below it the slice is computed densely;
            0 for never.
        last_q: queries at the end of a slice that vote.
        num_columns: maximum of `vertical`, limited to the longest context.
        tiles: tile sizes of the plans; blocks of keys shrink to a divisor of the page.
    """

    vertical: Int[Array, "L N"]
    slash: Int[Array, "L N"]
    least_recall: Float[Array, ""]
    last_q: int
    num_columns: int
    tiles: Tiles


class Report(NamedTuple):
    """Report of a sparse slice: density and recall per layer and head, float32.

    Attributes:
        density: computed pairs of query and key as a fraction of the causal ones.
        recall: fraction of attention on the keys that were read, averaged over the last queries
            of the slice; 1 for a head that was computed densely.
    """

    density: Float[Array, "*L N"]
    recall: Float[Array, "*L N"]


def tiles_on(platform: str) -> Tiles:
    """Returns the tile sizes of plans on a platform: "cpu", "gpu" or "tpu"."""
    return {"gpu": GPU_TILES, "tpu": TPU_TILES}.get(platform, TILES)


def vertical_budgets(config: SparseConfig) -> Int[np.ndarray, "L N"]:
    """Returns the column budgets as the original engines read them: 30 means 130."""
    vertical = np.asarray(config.vertical, np.int32)
    return np.where(vertical == 30, 130, vertical)


def most_columns(config: SparseConfig, num_keys: int | None = None) -> int:
    """Returns the largest column budget of any head, limited to a context of `num_keys` keys."""
    most = int(vertical_budgets(config).max())
    return most if num_keys is None else min(most, num_keys)


def budgets(
    config: SparseConfig,
    *,
    num_keys: int | None = None,
    least_recall: float = 0.0,
    tiles: Tiles = TILES,
) -> Budgets:
    """Puts the budgets of a checkpoint on the default device.

    Args:
        num_keys: the longest context in tokens, if it is known; a head cannot read more columns.
        least_recall: see `Budgets`.
        tiles: tile sizes of the plans.
    """
    return Budgets(
        vertical=jnp.asarray(vertical_budgets(config)),
        slash=jnp.asarray(np.asarray(config.slash, np.int32)),
        least_recall=jnp.float32(least_recall),
        last_q=config.last_q,
        num_columns=most_columns(config, num_keys),
        tiles=tiles,
    )
