"""Attention over DCA views in float64, one query and one head at a time, from the definition."""

import numpy as np


def view(q_pos, k_pos, geometry):
    """0, 1 or 2: same chunk, the chunk before, or older; 0 without chunks."""
    if geometry is None:
        return 0
    chunk = geometry.chunk_size - geometry.local_size
    return min(q_pos // chunk - k_pos // chunk, 2)


def attention(queries, keys, values, start, length, geometry, mask=None):
    """Output [T, N, H] and log-sum-exp [T, N] of queries [views, T, N, H] over keys [S, K, H].

    Of causal pairs, or of those of them in a mask [N, T, S].
    """
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    _, T, N, H = queries.shape
    out, lse = np.zeros((T, N, H)), np.full((T, N), -np.inf)
    for t in range(length):
        for n in range(N):
            head = n // (N // keys.shape[1])
            read = np.arange(start + t + 1)
            read = read if mask is None else read[mask[n, t, : start + t + 1]]
            if not len(read):
                continue
            scores = np.array(
                [queries[view(start + t, s, geometry), t, n] @ keys[s, head] for s in read]
            )
            weights = np.exp(scores - scores.max())
            lse[t, n] = scores.max() + np.log(weights.sum())
            out[t, n] = weights @ values[read, head] / weights.sum()
    return out, lse
