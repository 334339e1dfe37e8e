"""Sizes of Triton kernels where nothing is tuned: from what compilers made of them, not from times.

A program holds the output of its rows in registers, the keys and values of its next steps in shared
memory. Products of float32, which tensor cores do not make, hold much more in registers, so that
their tiles are small. The data centers' Blackwell has its products in tensor memory, for which all
warps of a program wait, so that two small programs do better than a large one.
"""

from typing import NamedTuple

from pallas_kernels.dispatch.tiles import Tiles

TILE_BYTES = 2**14
"""Bytes of the keys that a step of decode loads, and of its values."""
PROGRAMS = {80: 2 * 108, 86: 84, 89: 142, 90: 3 * 132, 100: 3 * 148, 120: 188}
"""Decode programs that run at a time, by compute capability: what shared memory allows."""


class Prefill(NamedTuple):
    """Keywords of `prefill.triton.prefill`."""

    tiles: Tiles
    step: int
    num_warps: int
    num_stages: int


class Decode(NamedTuple):
    """Keywords of `decode.triton.decode`."""

    tile: int
    programs: int
    num_warps: int
    num_stages: int


class Select(NamedTuple):
    """Keywords of `select.triton.vote`."""

    num_warps: int
    num_stages: int


def prefill(capability: int, itemsize: int, head_dim: int, *, sparse: bool) -> Prefill:
    """Return sizes for a GPU of a compute capability and elements of `itemsize` bytes."""
    if itemsize > 2:
        return Prefill(Tiles(q=32, k=16), step=32, num_warps=8, num_stages=2)
    if head_dim > 128:
        return Prefill(Tiles(q=64, k=32), step=16, num_warps=8, num_stages=2)
    if 100 <= capability < 120:
        if sparse:
            return Prefill(Tiles(q=128, k=32), step=32, num_warps=8, num_stages=3)
        return Prefill(Tiles(q=128, k=32), step=32, num_warps=4, num_stages=3)
    if 90 <= capability < 100:
        return Prefill(Tiles(q=128, k=128), step=32, num_warps=8, num_stages=3)
    return Prefill(Tiles(q=128, k=64), step=16, num_warps=8, num_stages=3)


def decode(capability: int, itemsize: int, head_dim: int) -> Decode:
    """Return sizes of decode, see `prefill`."""
    tile = 16 if itemsize > 2 else min(max(TILE_BYTES // (head_dim * itemsize), 16), 64)
    programs = PROGRAMS.get(capability, PROGRAMS[90])
    return Decode(tile, programs, num_warps=4, num_stages=3)


def select(capability: int) -> Select:
    """Return sizes of selection: as many stages as leave room for two programs of head_dim 128."""
    return Select(num_warps=4, num_stages=2 if capability in (86, 89) or capability >= 120 else 3)
