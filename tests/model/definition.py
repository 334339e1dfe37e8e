"""The whole model in float64 with one relative position per pair of tokens, from the definition.

Dual Chunk Attention as released with Qwen2.5-1M: distances within a chunk and into the
previous chunk are exact up to `chunk_size`, at which all others are cut off
(arXiv:2402.17463, section 3; arXiv:2501.15383, section 4).
"""

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
) -> np.ndarray:
    """Logits of every position.

    Args:
        query_scale: temperature factor on the query of each position.
        key_scale: temperature factor on the key of each position.
    """
    T = len(tokens)
    if config.dual_chunk is None:
        relative = np.subtract.outer(np.arange(T), np.arange(T))
    else:
        relative = relative_positions(T, config.dual_chunk.chunk_size, config.dual_chunk.local_size)
    scale = np.outer(np.broadcast_to(query_scale, T), np.broadcast_to(key_scale, T))
    x = _wide(weights["embed"]["embedding"])[list(tokens)]
    for layer in range(config.num_layers):
        block = _layer(weights["blocks"], layer)
        normed = _rms_norm(x, block["attention_norm"]["scale"], config.norm_eps)
        x = x + _attention(config, block["attention"], normed, relative, scale)
        normed = _rms_norm(x, block["mlp_norm"]["scale"], config.norm_eps)
        gate = normed @ block["mlp"]["gate"]["kernel"]
        up = normed @ block["mlp"]["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]
    x = _rms_norm(x, _wide(weights["norm"]["scale"]), config.norm_eps)
    if config.tie_embeddings:
        return x @ _wide(weights["embed"]["embedding"]).T
    return x @ _wide(weights["head"]["kernel"])


def _attention(config, layer, x, relative, scale):
    T = len(x)
    q, k, v = (
        np.einsum("td,dnh->nth", x, layer[name]["kernel"]) + layer[name]["bias"][:, None]
        for name in "qkv"
    )
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half) / half)
    angle = relative[..., None] * frequency
    cos, sin = np.cos(angle), np.sin(angle)
    causal = np.tril(np.ones((T, T), bool))
    out = np.zeros((config.num_heads, T, config.head_dim))
    for n in range(config.num_heads):
        kv = n // (config.num_heads // config.num_kv_heads)
        q1, q2 = q[n, :, None, :half], q[n, :, None, half:]
        k1, k2 = k[kv, None, :, :half], k[kv, None, :, half:]
        # <R(relative) q, k>, the rotation turning the pairs (q1, q2).
        scores = ((q1 * k1 + q2 * k2) * cos + (q1 * k2 - q2 * k1) * sin).sum(-1)
        scores = np.where(causal, scores * scale / np.sqrt(config.head_dim), -np.inf)
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
