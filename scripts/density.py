"""Density of sparse prefill by a model's budgets: the fraction of attention computed, by length.

Selections and plans are made as in a prefill, with the same code, from synthetic votes of two
kinds, since real ones need the model and a text. They bracket a text:

- clustered: runs of 64 neighbours share a weight, on top of a vote that falls with the distance;
- scattered: every column and diagonal has a weight of its own. With tiles of 256 rows and
  blocks of 64 keys a lone diagonal costs a tile up to 5 blocks, so this is the worst case.

    python scripts/density.py sparse_attention_config.json [--tile 256x64] [--head-dim 128]
"""

import argparse
import collections
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import plan
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.select.api import FORCED_COLUMNS, FORCED_DIAGONALS
from pallas_kernels.select.top import top
from qwen_jax.config import ConfigError, SparseConfig
from qwen_jax.hf_config import head_budgets, read_json
from qwen_jax.sparse import budgets as sparse

LENGTHS = {"128k": 2**17, "256k": 2**18, "512k": 2**19, "1M": 2**20}
SLICE = 32768
RUN = 64
Votes = Callable[[np.random.Generator, int], np.ndarray]


def clustered(rng: np.random.Generator, end: int) -> np.ndarray:
    """Draws votes by position, which fall with the distance from `end`."""
    run = np.arange(end)[::-1] // RUN
    return (1 / (1 + run) + 0.1 * rng.exponential(size=run[0] + 1)[run]).astype(np.float32)


def scattered(rng: np.random.Generator, end: int) -> np.ndarray:
    return rng.random(end, np.float32)


KINDS: dict[str, Votes] = {"clustered": clustered, "scattered": scattered}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("budgets", type=Path, help="sparse_attention_config.json of a checkpoint")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--tile",
        type=tiles,
        default=sparse.TILES,
        metavar="QxK",
        help="queries a tile and keys a block; default: 256x64; the original kernel has 64x64",
    )
    args = parser.parse_args()
    try:
        heads = head_counts(args.budgets)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{heads.total()} heads, {len(heads)} different budgets; slices of {SLICE:,} tokens, "
        f"tiles of {args.tile.q} queries, blocks of {args.tile.k} keys\n"
    )
    print("| tokens | dense, PFLOP | votes | density | sparse, PFLOP | ratio |")
    print("|---|---|---|---|---|---|")
    slices = max(LENGTHS.values()) // SLICE
    by_kind = {
        kind: [slice_density(heads, votes, i * SLICE, args.tile) for i in range(slices)]
        for kind, votes in KINDS.items()
    }
    for name, length in LENGTHS.items():
        dense = 4 * args.head_dim * heads.total() * length * (length + 1) / 2 / 1e15
        pairs = SLICE * np.arange(0.5, length // SLICE)  # of a slice, by token
        for kind, found in by_kind.items():
            density = float(np.average(found[: len(pairs)], weights=pairs))
            print(
                f"| {name} | {dense:.3g} | {kind} | {density:.1%} "
                f"| {density * dense:.3g} | {1 / density:.1f} |",
                flush=True,
            )
    return 0


def tiles(text: str) -> Tiles:
    """Parses tile sizes such as `256x64`."""
    try:
        q, k = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be QxK, as 256x64") from None
    if not 0 < q <= SLICE or not 0 < k <= SLICE:
        raise argparse.ArgumentTypeError(f"{text!r} must lie in [1, {SLICE}]")
    return Tiles(q=q, k=k)


def head_counts(path: Path) -> collections.Counter[tuple[int, int]]:
    """Counts the heads of all layers with each pair of budgets, as they are used.

    Raises:
        ConfigError: if the file is malformed.
    """
    layers = read_json(path)
    is_list = isinstance(layers, list) and layers and isinstance(layers[0], dict)
    shape = (len(layers), max(len(layers[0]), 1)) if is_list else (1, 1)
    vertical, slash = head_budgets(layers, path, *shape)
    budgets = sparse.budgets(SparseConfig(vertical=vertical, slash=slash))
    pairs = np.stack([budgets.vertical, budgets.slash], -1).reshape(-1, 2)
    return collections.Counter(map(tuple, pairs.tolist()))


def slice_density(
    heads: collections.Counter[tuple[int, int]], votes: Votes, start: int, tiles: Tiles
) -> float:
    """Computes the density of the slice from `start`, averaged over heads."""
    end = start + SLICE
    size = 1 << (end - 1).bit_length()  # few shapes, few programs
    rng = np.random.default_rng(start)
    columns, diagonals = (
        jnp.asarray(np.pad(votes(rng, end), (0, size - end))[None]) for _ in range(2)
    )
    most = max(vertical for vertical, _ in heads)
    total = sum(
        count
        * float(
            pair_density(
                columns,
                diagonals,
                jnp.array([vertical]),
                jnp.array([slash]),
                jnp.int32(start),
                num_columns=most,
                tiles=tiles,
            )[0]
        )
        for (vertical, slash), count in heads.items()
    )
    return total / heads.total()


@functools.partial(jax.jit, static_argnames=("num_columns", "tiles"))
def pair_density(columns, diagonals, vertical, slash, start, *, num_columns, tiles):
    end, length = start + SLICE, jnp.int32(SLICE)
    listed = plan.build(
        top(columns, vertical, low=0, high=FORCED_COLUMNS, end=end),
        top(diagonals, slash, low=end - FORCED_DIAGONALS, high=end, end=end),
        start,
        length,
        num_queries=SLICE,
        num_columns=num_columns,
        tiles=tiles,
    )
    return plan.density(listed, start, length)


if __name__ == "__main__":
    raise SystemExit(main())
