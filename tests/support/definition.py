"""The whole model in float64 with one relative position per pair of tokens, from the definition.

Dual Chunk Attention as released with Qwen2.5-1M: distances within a chunk and into the
previous chunk are exact up to `chunk_size`, at which all others are cut off
(arXiv:2402.17463, section 3; arXiv:2501.15383, section 4).
"""

import functools
from collections.abc import Callable

import numpy as np

from qwen_jax.config import ModelConfig


def relative_positions(length: int, chunk_size: int, local_size: int) -> np.ndarray:
    """`[length, length]`: the distance that query i sees to key j; meaningless for j > i."""
    chunk = chunk_size - local_size
    relative = np.zeros((length, length), int)
    for i in range(length):
        for j in range(i + 1):
            chunks_apart = i // chunk - j // chunk
            if chunks_apart == 0:
                query = i % chunk
            elif chunks_apart == 1:
                query = min(i % chunk + chunk, chunk_size)
            else:
                query = min(2 * chunk - 1, chunk_size)
            relative[i, j] = query - j % chunk
    return relative


def logits(
    config: ModelConfig,
    weights: dict,
    tokens: tuple[int, ...],
    query_scale: np.ndarray | float = 1.0,
    key_scale: np.ndarray | float = 1.0,
    read: Callable[..., np.ndarray] | None = None,
) -> np.ndarray:
    """Logits of every position.

    Args:
        query_scale: temperature factor on the query of each position.
        key_scale: temperature factor on the key of each position.
        read: of a layer's number and its queries [N, T, H] and keys [K, T, H] before they
            are rotated, which causal pairs [N, T, T] attend; None for all.
    """
    T = len(tokens)
    if config.dual_chunk is None:
        relative = np.subtract.outer(np.arange(T), np.arange(T))
    else:
        relative = relative_positions(T, config.dual_chunk.chunk_size, config.dual_chunk.local_size)
    turned = rotation(config, relative)
    scale = np.outer(np.broadcast_to(query_scale, T), np.broadcast_to(key_scale, T))
    x = _wide(weights["embed"]["embedding"])[list(tokens)]
    for layer in range(config.num_layers):
        block = _layer(weights["blocks"], layer)
        normed = _rms_norm(x, block["attention_norm"]["scale"], config.norm_eps)
        reads = None if read is None else functools.partial(read, layer)
        x = x + _attention(config, block["attention"], normed, turned, scale, reads)
        normed = _rms_norm(x, block["mlp_norm"]["scale"], config.norm_eps)
        gate = normed @ block["mlp"]["gate"]["kernel"]
        up = normed @ block["mlp"]["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]
    x = _rms_norm(x, _wide(weights["norm"]["scale"]), config.norm_eps)
    if config.tie_embeddings:
        return x @ _wide(weights["embed"]["embedding"]).T
    return x @ _wide(weights["head"]["kernel"])


def rotation(config: ModelConfig, relative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine [T, S, H / 2] of what distances [T, S] turn each pair of dimensions by."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half) / half)
    angle = relative[..., None] * frequency
    return np.cos(angle), np.sin(angle)


def rotated_scores(q: np.ndarray, k: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """<R q, k> [T, S] of q [T, H] and k [S, H], R turning the pairs (q1, q2) of each q by k."""
    half = q.shape[-1] // 2
    q1, q2 = q[:, None, :half], q[:, None, half:]
    k1, k2 = k[None, :, :half], k[None, :, half:]
    return ((q1 * k1 + q2 * k2) * cos + (q1 * k2 - q2 * k1) * sin).sum(-1)


def _attention(config, layer, x, turned, scale, read):
    T = len(x)
    q, k, v = (
        np.einsum("td,dnh->nth", x, layer[name]["kernel"]) + layer[name]["bias"][:, None]
        for name in "qkv"
    )
    reads = np.broadcast_to(np.tril(np.ones((T, T), bool)), (config.num_heads, T, T))
    if read is not None:
        reads = reads & read(q, k)
    out = np.zeros((config.num_heads, T, config.head_dim))
    for n in range(config.num_heads):
        kv = n // (config.num_heads // config.num_kv_heads)
        scores = rotated_scores(q[n], k[kv], *turned)
        scores = np.where(reads[n], scores * scale / np.sqrt(config.head_dim), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[n] = p / p.sum(-1, keepdims=True) @ v[kv]
    return np.einsum("nth,nhd->td", out, layer["o"]["kernel"])


def _rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _layer(blocks, layer: int):
    if isinstance(blocks, dict):
        return {name: _layer(child, layer) for name, child in blocks.items()}
    return _wide(blocks[layer])


def _wide(array) -> np.ndarray:
    return np.asarray(array, np.float64)
