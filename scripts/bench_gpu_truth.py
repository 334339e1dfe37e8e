"""Reference for scripts/bench_gpu.py: attention and votes in float64, from the definition."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pallas_kernels.cases import Served
from pallas_kernels.geometry import ChunkGeometry

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Tolerance of an output, relative to the norm of its row; of a log-sum-exp, absolute."""
Args = tuple[Any, ...]


class WrongError(Exception):
    """Error of a result that differs too much from the reference."""


def check_slice(rng: np.random.Generator, case: Served, args: Args, found, most: int, listed=None):
    """Compare at most so many rows of a prefill, with a plan or without.

    Returns:
        The largest errors.

    Raises:
        WrongError: if they are larger than they may be.
    """
    q, *where, start, length = args
    rows = some_rows(rng, int(length), most)
    positions = int(start) + rows
    reads = None
    if listed is not None:
        place = np.arange(positions.max() + 1)
        blocks = np.asarray(listed.reads())[:, rows // listed.tiles.q][..., place // listed.tiles.k]
        columns = np.stack([np.isin(place, each) for each in np.asarray(listed.columns)])
        reads = blocks | columns[:, None]
    truth = attention(q[:, rows], tuple(where), positions, case.geometry, reads)
    return compare([x[rows] for x in found], truth)


def some_rows(rng: np.random.Generator, length: int, most: int) -> np.ndarray:
    """Returns the first, the last, and random other rows, at most `most`."""
    if length <= most:
        return np.arange(length)
    return np.unique([0, length - 1, *rng.choice(length, most - 2, replace=False)])


def check_decode(case: Served, args: Args, found, sequences: Sequence[int]) -> dict[str, float]:
    """Compare some sequences of a decode; see `check_slice`."""
    q, cache, layer, tables, positions = args
    errors = []
    for b in sequences:
        at = np.asarray(positions[b])
        idle = at < 0
        where = cache, layer, tables[b]
        out, lse = attention(q[:, b], where, at.clip(0), case.geometry)
        out[idle], lse[idle] = 0, -np.inf
        errors.append(compare([x[b] for x in found], (out, lse)))
    return {name: max(each[name] for each in errors) for name in errors[0]}


def check_votes(case: Served, args: Args, found, heads: Sequence[int]) -> dict[str, float]:
    """Compare votes of some heads, each head's columns and diagonals as a row of an output."""
    q, cache, layer, table, start, length = args
    keys = cache.keys
    _, R, N, _ = q.shape
    end, rows = int(start) + int(length), min(R, int(length))
    positions, place = np.arange(int(start) + int(length) - rows, end), np.arange(end)
    view, read = views_of(case.geometry, positions, place), place <= positions[:, None]
    truth = np.zeros((2, len(heads), end))
    for i, n in enumerate(heads):
        key = of_head(keys, layer, table, n // (N // keys.shape[1]), end)
        score = logits(np.asarray(q[:, R - rows :, n]).astype(np.float64), key, view, read)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        truth[0, i] = weight.sum(0)
        for row in range(rows):
            after = rows - 1 - row
            truth[1, i, after:] += weight[row, : end - after]
    votes = np.stack([np.asarray(x)[list(heads)] for x in found])
    if votes[..., end:].any():
        raise WrongError("votes for keys past the end")
    nothing = np.zeros(truth.shape[:2])
    return compare((votes[..., :end], nothing), (truth, nothing), str(q.dtype))


def attention(
    q, args: Args, positions: np.ndarray, geometry: ChunkGeometry | None, reads=None
) -> tuple[np.ndarray, np.ndarray]:
    """Computes output [R, N, H] and log-sum-exp [R, N] of queries [views, R, N, H] at positions.

    Args:
        args: cache, layer and page table.
        reads: bool array [N, R, S]: the keys, up to the largest position, that each head and
            query reads; None for all causal ones.
    """
    cache, layer, table = args
    q = np.asarray(q).astype(np.float64)
    _, R, N, H = q.shape
    G = N // cache.keys.shape[1]
    place = np.arange(positions.max() + 1)
    view, causal = views_of(geometry, positions, place), place <= positions[:, None]
    out, lse = np.zeros((R, N, H)), np.full((R, N), -np.inf)
    for head in range(N // G):
        key, value = (
            of_head(x, layer, table, head, len(place)) for x in (cache.keys, cache.values)
        )
        for n in range(head * G, (head + 1) * G):
            score = logits(q[:, :, n], key, view, causal if reads is None else causal & reads[n])
            most = score.max(-1)
            some = most > -np.inf
            weight = np.exp(score[some] - most[some, None])
            total = weight.sum(-1)
            out[some, n] = weight @ value / total[:, None]
            lse[some, n] = most[some] + np.log(total)
    return out, lse


def of_head(x, layer, table, head: int, end: int) -> np.ndarray:
    """Gathers keys or values [end, H] of a KV head in float64."""
    found = np.asarray(x[int(layer), head, table])
    return found.reshape(-1, found.shape[-1])[:end].astype(np.float64)


def views_of(geometry: ChunkGeometry | None, positions: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Returns the index of the query's view for each pair of query and key."""
    if geometry is None:
        return np.zeros((len(positions), len(keys)), int)
    length = geometry.chunk_size - geometry.local_size
    return np.minimum(positions[:, None] // length - keys // length, 2)


def logits(q: np.ndarray, key: np.ndarray, view: np.ndarray, read: np.ndarray) -> np.ndarray:
    """Computes scores [R, S] of queries [views, R, H], -inf where a key is not read."""
    found = np.full(view.shape, -np.inf)
    for number, rows in enumerate(q):
        here = read & (view == number)
        if here.any():
            found = np.where(here, rows @ key.T, found)
    return found


def compare(found, truth, dtype: str | None = None) -> dict[str, float]:
    """Returns the largest errors of an output and a log-sum-exp; see `check_slice`.

    Args:
        dtype: dtype of the computation; None for that of the output.
    """
    allowed = TOLERANCE[dtype or str(found[0].dtype)]
    out, lse = (np.asarray(x).astype(np.float64) for x in found)
    size = np.linalg.norm(truth[0], axis=-1)
    error = np.linalg.norm(out - truth[0], axis=-1) / np.where(size > 0, size, 1)
    same = lse == truth[1]  # -inf too
    apart = np.abs(np.subtract(lse, truth[1], where=~same, out=np.zeros_like(lse)))
    errors = {"error": float(error.max()), "lse_error": float(apart.max())}
    if not all(value <= allowed for value in errors.values()):  # NaN is wrong
        said = ", ".join(f"{name} {value:.2g}" for name, value in errors.items())
        raise WrongError(f"{said}, where {allowed} is allowed")
    return errors
