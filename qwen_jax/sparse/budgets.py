"""Sparse prefill of a layer: budgets on the device, the plan of a slice, and how good it was."""

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
"""Of plans; shorter blocks read less beside what was selected."""
TPU_TILES = Tiles(q=1024, k=128)
"""Of plans on a TPU, which copies each block by itself and loses time on short ones."""
GPU_TILES = Tiles(q=128, k=64)
"""Of plans on a GPU: a tile that one program takes; more queries read more beside their own."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vertical", "slash", "least_recall"],
    meta_fields=["last_q", "num_columns", "tiles"],
)
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What every head may read, as arrays that a loop over layers can index.

    Attributes:
        vertical: columns.
        slash: diagonals.
        least_recall: heads that recall less of a slice read all of it; 0 for none.
        last_q: queries of a slice that vote.
        num_columns: most columns that a head may have, at the longest context.
        tiles: of the plans; blocks of keys shrink to a divisor of the page.
    """

    vertical: Int[Array, "L N"]
    slash: Int[Array, "L N"]
    least_recall: Float[Array, ""]
    last_q: int
    num_columns: int
    tiles: Tiles


class Report(NamedTuple):
    """How a slice was prefilled, per layer and head.

    Attributes:
        density: pairs computed, as a share of the causal ones.
        recall: attention that the last queries of the slice found in what was read.
    """

    density: Float[Array, "*L N"]
    recall: Float[Array, "*L N"]


def tiles_on(platform: str) -> Tiles:
    """Tiles of plans on a platform ("cpu", "gpu" or "tpu")."""
    return {"gpu": GPU_TILES, "tpu": TPU_TILES}.get(platform, TILES)


def vertical_budgets(config: SparseConfig) -> Int[np.ndarray, "L N"]:
    """Columns of every head, as the original engines read them: 30 mean 130."""
    vertical = np.asarray(config.vertical, np.int32)
    return np.where(vertical == 30, 130, vertical)


def most_columns(config: SparseConfig, num_keys: int | None = None) -> int:
    """Columns that a head reads at most, of a context of so many keys."""
    most = int(vertical_budgets(config).max())
    return most if num_keys is None else min(most, num_keys)


def budgets(
    config: SparseConfig,
    *,
    num_keys: int | None = None,
    least_recall: float = 0.0,
    tiles: Tiles = TILES,
) -> Budgets:
    """The budgets of a checkpoint, on the device.

    Args:
        num_keys: the longest context, if it is known; a head cannot read more columns.
    """
    return Budgets(
        vertical=jnp.asarray(vertical_budgets(config)),
        slash=jnp.asarray(np.asarray(config.slash, np.int32)),
        least_recall=jnp.float32(least_recall),
        last_q=config.last_q,
        num_columns=most_columns(config, num_keys),
        tiles=tiles,
    )
