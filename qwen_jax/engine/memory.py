"""Memory and FLOPs on a mesh: bytes per device, and the longest context that fits.

Counted are the parameters and the cache as they will be placed, and the peak of a prefill
slice of T tokens, of which a device holds t = T / seq outside attention: the largest of the
following moments (b bytes per element; query heads n, KV heads k and MLP width f of a device;
V rotations of each query; S keys, of which s lie on a device):

                activations                              workspace
    rotation    4 t D b + 2 t k H b + (V + 1) T n H b    V T n H (4 + 2 b) + 4 T n H
    selection   4 t D b + 2 T k H b + T n H b            4 n (7 s + 3 S)
    attention   4 t D b + (V + 1) T n H b                2 n C H b
    MLP         4 t D b + 3 t f b                        D f b
    window                                               2 (l w + 2 W) k H b

The workspace of the rotation is its float32 result before rounding, the queries in the
order in which a kernel reads them, and the kernel's float32 output; that of the MLP is one matrix
copied from the stack of layers. Sparse prefill selects by numbers for each head and key, of which
the diagonals need all keys, and packs its C columns. Between slices a session extracts a window
of W tokens of all l layers from the cache or inserts one, with w = W / seq of them on a device,
while the tokens of one or two layers are gathered. Keys are not moved: every device along
`seq` holds all queries of the slice, for its heads. A decode step takes less than a slice.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.distributed.sharding import RULES, MeshShape, Rules
from qwen_jax.models import kv_cache, params

_FLOAT32 = 4
# Of a number for each head and key, while a slice selects: as XLA holds them, kernels hold fewer.
_LOCAL_ARRAYS, _WHOLE_ARRAYS = 7, 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Workload of each part of the mesh along `data`.

    Attributes:
        tokens: length of the longest sequence, prompt and answer together.
        page: tokens per cache page.
        slice_len: tokens per prefill slice.
        cache_pages: pages of the cache, without the one for padding; None for those of one
            sequence.
        dtype: dtype of weights and cache.
        columns: most key columns that a head reads in sparse prefill; None if prefill is dense.
        window: tokens held outside the cache too between slices (`models.kv_transfer`).
        relayouts_weights: whether the compiler copies the layers' matrices into another layout
            in every step (`planner.devices.Device`).
    """

    tokens: int
    page: int
    slice_len: int
    cache_pages: int | None = None
    dtype: str = "bfloat16"
    columns: int | None = None
    window: int = 0
    relayouts_weights: bool = False

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def pages(self) -> int:
        """Number of pages of the longest sequence."""
        return -(-self.tokens // self.page)


class Memory(NamedTuple):
    """Peak memory of one device, in bytes."""

    weights: int
    cache: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(self)


def memory(config: ModelConfig, load: Workload, mesh: MeshShape, rules: Rules = RULES) -> Memory:
    """Estimates the peak memory of a device of the mesh, in bytes."""
    activations, workspace = _slice(config, load, mesh, rules)
    return Memory(
        weights=weights(config, mesh, rules) * load.itemsize,
        cache=_cache(config, load, mesh, rules),
        activations=activations,
        workspace=workspace
        + _tables(config, load, mesh, rules)
        + load.relayouts_weights * _relaid(config, mesh, rules) * load.itemsize,
    )


@functools.lru_cache(maxsize=64)
def weights(config: ModelConfig, mesh: MeshShape, rules: Rules = RULES) -> int:
    """Returns the number of parameters on a device."""
    return sum(math.prod(mesh.shard(shape, axes, rules)) for shape, axes in _arrays(config))


@functools.lru_cache(maxsize=8)
def _arrays(config: ModelConfig) -> tuple[tuple[tuple[int, ...], tuple[str, ...]], ...]:
    """Returns shape and logical axes of every parameter."""
    shapes = params.abstract(config)
    found = jax.tree.map(lambda leaf, axes: (leaf.shape, axes), shapes, params.axes(config))
    return tuple(jax.tree.leaves(found, is_leaf=lambda node: isinstance(node, tuple)))


def _cache(config: ModelConfig, load: Workload, mesh: MeshShape, rules: Rules) -> int:
    pages = (load.pages if load.cache_pages is None else load.cache_pages) * mesh.data
    shape = config.num_layers, config.num_kv_heads, pages, load.page, config.head_dim
    layers, heads, pages, page, dim = mesh.shard(shape, kv_cache.AXES, rules)
    # Every device has a page for padding beside its own.
    return 2 * layers * heads * (pages + 1) * page * dim * load.itemsize


def _slice(config: ModelConfig, load: Workload, mesh: MeshShape, rules: Rules) -> tuple[int, int]:
    """Returns the bytes of activations and workspace of a prefill slice at its peak."""

    def part(size: int, axis: str) -> int:
        return mesh.shard((size,), (axis,), rules)[0]

    T, D, H, b = load.slice_len, config.embed_dim, config.head_dim, load.itemsize
    t, n = part(T, "tokens"), part(config.num_heads, "heads")
    k, f = part(config.num_kv_heads, "kv_heads"), part(config.mlp_dim, "mlp")
    residual = 4 * t * D * b
    query = T * n * H  # of one view
    views = 1 if config.dual_chunk is None else 3
    moments = [
        (
            residual + 2 * t * k * H * b + (views + 1) * query * b,
            views * query * (_FLOAT32 + 2 * b) + query * _FLOAT32,
        ),
        (residual + 3 * t * f * b, D * f * b),
    ]
    if load.window:
        W = load.window
        w = W if W % mesh.seq else part(W, "tokens")
        moments.append((0, 2 * (config.num_layers * w + 2 * W) * k * H * b))
    if load.columns is not None:
        keys = load.pages * load.page
        arrays = _LOCAL_ARRAYS * part(keys, "page") + _WHOLE_ARRAYS * keys
        moments += [
            (residual + 2 * T * k * H * b + query * b, n * arrays * _FLOAT32),
            (residual + (views + 1) * query * b, 2 * n * load.columns * H * b),
        ]
    return max(moments, key=sum)


def _relaid(config: ModelConfig, mesh: MeshShape, rules: Rules) -> int:
    """Returns the number of elements of a device's output and MLP matrices, of all layers."""
    matrices = (
        (config.num_heads, config.head_dim, config.embed_dim),
        *[(config.embed_dim, config.mlp_dim, 1)] * 3,
    )
    axes = ("heads", "head_dim", "embed"), *[("embed", "mlp", "head_dim")] * 3
    shards = (mesh.shard(shape, of, rules) for shape, of in zip(matrices, axes, strict=True))
    return config.num_layers * sum(map(math.prod, shards))


def _tables(config: ModelConfig, load: Workload, mesh: MeshShape, rules: Rules) -> int:
    """Returns the bytes of the rotary angles and of the logits of one token, in float32."""
    rows = load.pages * load.page
    if config.dual_chunk is not None and rows > config.dual_chunk.chunk_len:
        rows = config.dual_chunk.chunk_size + 1
    (vocab,) = mesh.shard((config.vocab_size,), ("vocab",), rules)
    return (rows * config.head_dim + vocab) * _FLOAT32


def longest(
    config: ModelConfig,
    load_of: Callable[[int], Workload],
    mesh: MeshShape,
    limit: int,
    rules: Rules = RULES,
) -> int:
    """Returns the longest sequence, in tokens, with which a device needs at most `limit` bytes.

    It is a whole number of pages, 0 if not even one fits, and under 2^31, as positions are.

    Args:
        load_of: maps a length in tokens to its workload; more tokens must not need less memory.
        limit: bytes available on a device.
    """
    page = load_of(1).page

    def fits(pages: int) -> bool:
        return memory(config, load_of(pages * page), mesh, rules).total <= limit

    low, high = 0, (2**31 - 1) // page + 1  # `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * page


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Counts the FLOPs of dense prefill of `tokens` tokens, for the whole model.

    Of the last layer only keys and values count: what follows needs one token per slice.
    """
    layers = config.num_layers - 1
    pairs = tokens * (tokens + 1) // 2
    attention = 4 * config.num_heads * config.head_dim * pairs
    return layers * (attention + 2 * block(config) * tokens) + 2 * _keys_values(config) * tokens


def decode_flops(config: ModelConfig, length: int) -> int:
    """Counts the FLOPs of one decoded token after `length` others, for the whole model."""
    attention = 4 * config.num_heads * config.head_dim * (length + 1)
    head = config.embed_dim * config.vocab_size
    return config.num_layers * (attention + 2 * block(config)) + 2 * head


def decode_bytes(config: ModelConfig, load: Workload, mesh: MeshShape, rules: Rules = RULES) -> int:
    """Returns the bytes that a device reads to decode the last token.

    These are all of its weights, except a separate embedding, and the cache.
    """
    count = weights(config, mesh, rules)
    if not config.tie_embeddings:
        table = config.vocab_size, config.embed_dim
        count -= math.prod(mesh.shard(table, ("vocab", "embed"), rules))
    return count * load.itemsize + _cache(config, load, mesh, rules)


def block(config: ModelConfig) -> int:
    """Returns the number of parameters in the matrices of one layer."""
    queries = 2 * config.embed_dim * config.num_heads * config.head_dim
    return queries + _keys_values(config) + 3 * config.embed_dim * config.mlp_dim


def _keys_values(config: ModelConfig) -> int:
    return 2 * config.embed_dim * config.num_kv_heads * config.head_dim
