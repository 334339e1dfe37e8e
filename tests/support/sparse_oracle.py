"""Vertical-slash selection in numpy and float64, region by region as in spec 3.3 to 3.5."""

import numpy as np

from support import oracle


def votes(queries, keys, start, length, geometry):
    """Sums by column and by diagonal [N, e] of the last rows of queries [views, R, N, H]."""
    queries, keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    _, R, N, _ = queries.shape
    e = start + length
    rows = min(R, length)
    columns, diagonals = np.zeros((N, e)), np.zeros((N, e))
    for n in range(N):
        head = n // (N // keys.shape[1])
        for rho in range(rows):
            position, row = e - rows + rho, R - rows + rho
            s = np.array(
                [
                    queries[oracle.view(position, j, geometry), row, n] @ keys[j, head]
                    for j in range(position + 1)
                ]
            )
            weights = np.exp(s - s.max())
            weights /= weights.sum()
            columns[n, : position + 1] += weights
            diagonals[n, rows - 1 - rho : e] += weights
    return columns, diagonals


def piece_votes(queries, keys, start, length, geometry):
    """Computes `votes` of a piece inside one chunk: the scores of 3.3, region beside region."""
    queries, keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    _, R, N, _ = queries.shape
    e = start + length
    rows = min(R, length)
    columns, diagonals = np.zeros((N, e)), np.zeros((N, e))
    nearest_first = regions(start, length, geometry)
    for n in range(N):
        head = n // (N // keys.shape[1])
        scores = [
            queries[number, R - rows :, n] @ keys[first : first + kv, head].T
            for number, (first, kv, _) in enumerate(nearest_first)
        ]
        s = np.concatenate(scores[::-1], axis=1)
        s[:, e - rows :][np.triu_indices(rows, 1)] = -np.inf
        weights = np.exp(s - s.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        columns[n] = weights.sum(0)
        for rho in range(rows):
            shift = rows - 1 - rho
            diagonals[n, shift:] += weights[rho, : e - shift]
    return columns, diagonals


def largest(values, budget, forced):
    """Positions of the `budget` largest, forced ones first, equal ones by position."""
    values = values.copy()
    values[forced] = np.inf
    return np.sort(np.argsort(-values, kind="stable")[:budget])


def assert_largest(found, values, budget, forced, rtol=1e-5):
    """Compares with `largest`; of votes that differ by rounding either may be chosen."""
    expected = largest(values, budget, forced)
    assert len(found) == len(expected)
    differing = np.setxor1d(found, expected)
    if len(differing):
        assert not np.isin(differing, forced).any()
        least = values[np.setdiff1d(expected, forced)].min()
        np.testing.assert_allclose(values[differing], least, rtol=rtol)


def regions(start, length, geometry):
    """First key, number of keys and last diagonal + 1 of the regions intra, succ and inter."""
    e = start + length
    if geometry is None:
        return [(0, e, e)]
    chunk = geometry.chunk_size - geometry.local_size
    P = start // chunk * chunk
    assert e <= P + chunk, "a piece lies in one chunk"
    found = [(P, e - P, e)]
    if chunk <= P:
        found.append((P - chunk, chunk, P + length))
    if 2 * chunk <= P:
        found.append((0, P - chunk, P - chunk + length))
    return found


def cells(columns, diagonals, start, length, geometry):
    """Pairs [length, e] that columns and diagonals select, from the table of 3.4."""
    e = start + length
    chosen = np.zeros((length, e), bool)
    for first, kv, stop in regions(start, length, geometry):
        intra = first + kv == e
        base = kv - length if intra else kv
        for v in columns:
            if first <= v < first + kv:
                chosen[:, v] = True
        for t in diagonals:
            if t < stop and (first <= t or not intra):
                offset = (e - 1 if intra else first + kv + length - 1) - t
                for rho in range(length):
                    key = base + rho - offset
                    if 0 <= key < kv:
                        chosen[rho, first + key] = True
    causal = np.arange(e) <= start + np.arange(length)[:, None]
    return chosen & causal


def blocks(diagonals, start, length, geometry, q_tile, k_block):
    """Key blocks [tiles, blocks] that the windows of 3.5 touch, tile by tile of q_tile rows."""
    e = start + length
    touched = np.zeros((-(-length // q_tile), -(-e // k_block)), bool)
    for tile in range(len(touched)):
        m0 = tile * q_tile
        rows = min(q_tile, length - m0)
        for first, kv, stop in regions(start, length, geometry):
            intra = first + kv == e
            base = kv - length if intra else kv
            for t in diagonals:
                offset = (e - 1 if intra else first + kv + length - 1) - t
                x = base + m0 - offset
                low, high = max(x, 0), min(x + rows, kv)
                if t < stop and low < high:
                    touched[tile, (first + low) // k_block : (first + high - 1) // k_block + 1] = 1
    return touched
