"""Roofline of a slice and a token on a device of a mesh: FLOPs, memory traffic, bytes sent.

Costs are counted from the sizes of arrays as the programs are compiled for TPUs. In attention,
keys are read once for each tile of queries. Every device along `seq` rotates all queries of a
slice, for its heads, and builds its plans from all keys: these costs do not shrink with `seq`.
"""

from typing import NamedTuple

from qwen_jax.config import ModelConfig
from qwen_jax.distributed.sharding import MeshShape
from qwen_jax.engine import memory as budget
from qwen_jax.engine.memory import Workload
from qwen_jax.planner.devices import Device
from qwen_jax.sparse.budgets import TPU_TILES

_FLOAT32 = 4
_TILE_ROWS, _LANES = 1792, 128  # of a tile of dense queries: rows of a head's group, and their unit
_ROTATION = 30  # bytes read and written for each number that is rotated, as compiled
_HALVINGS = 62  # passes over the votes that find the largest of two kinds
_PLAN = 8 * _FLOAT32  # bytes read and written for each key while diagonals become blocks
_OVER = 128  # votes that reach from one part of a page into the next


class Cost(NamedTuple):
    """Cost of a step on one device.

    Attributes:
        flops: floating-point operations.
        memory: bytes read from and written to its memory.
        sent: bytes sent to other devices.
    """

    flops: float
    memory: float
    sent: float

    def seconds(self, device: Device) -> tuple[float, float, float]:
        """Returns the minimum time in seconds of each of the three, at published rates.

        Raises:
            ValueError: if the device has no published rates.
        """
        if device.flops is None or device.bandwidth is None or device.links is None:
            raise ValueError(f"no rates are published for {device}")
        return self.flops / device.flops, self.memory / device.bandwidth, self.sent / device.links


def of_slice(
    config: ModelConfig, load: Workload, mesh: MeshShape, keys: float | None = None
) -> Cost:
    """Computes the cost of the prefill slice that ends at the last token of the workload.

    Args:
        keys: average number of keys that a query reads per head in sparse prefill; None for
            dense prefill.
    """
    L, D, H, b = config.num_layers - 1, config.embed_dim, config.head_dim, load.itemsize
    T, N, K = load.slice_len, config.num_heads, config.num_kv_heads
    seq, tensor = mesh.seq, mesh.tensor
    t, n, k, f = T / seq, N / tensor, K / tensor, config.mlp_dim / tensor
    context = load.tokens - T / 2
    read = context if keys is None else min(keys, context)
    views = 1 if config.dual_chunk is None else 3

    linear = 2 * budget.block(config) * T
    flops = L * (linear + 4 * N * H * read * T) / (seq * tensor)

    group = N // K
    rows = max(_TILE_ROWS // group // _LANES, 1) * _LANES
    memory = budget.block(config) / tensor * b + 12 * t * D * b + 4 * t * f * b
    memory += _ROTATION * views * T * n * H
    if keys is None:
        memory += 2 * (T / rows) * context / seq * k * H * b
    else:
        memory += 2 * (T / TPU_TILES.q) * read / seq * n * H * b
        # The vote reads keys twice and makes two numbers for each head.
        memory += 2 * load.tokens / seq * k * H * b
        memory += n * load.tokens * (_HALVINGS * _FLOAT32 / seq + _PLAN)
    return Cost(flops, L * memory, slice_sent(config, load, mesh))


def slice_sent(config: ModelConfig, load: Workload, mesh: MeshShape) -> float:
    """Returns the bytes that a device sends in a prefill slice.

    Along `tensor` these are two all-reduces per layer and the embedding; along `seq`, queries,
    keys and values of the slice, and partial outputs with their log-sum-exp. Sparse slices also
    send which diagonals were selected, and votes that cross the border of a part.
    """
    L, D, H, b = config.num_layers, config.embed_dim, config.head_dim, load.itemsize
    n, k = config.num_heads / mesh.tensor, config.num_kv_heads / mesh.tensor
    t, others = load.slice_len / mesh.seq, mesh.seq - 1
    sent = 2 * (mesh.tensor - 1) / mesh.tensor * t * D * b * (2 * (L - 1) + 1)
    sent += others * t * ((L - 1) * (2 * n * H * b + n * _FLOAT32) + 2 * L * k * H * b)
    if load.columns is not None and others:
        flags = load.pages * load.page / mesh.seq * others
        reaching = load.pages * (_OVER * _FLOAT32 + 2 * others * _FLOAT32)
        sent += (L - 1) * n * (flags + reaching)
    return sent


def gathered_sent(config: ModelConfig, load: Workload, mesh: MeshShape) -> float:
    """Returns `slice_sent` for a scheme that moves keys and values of the context, not queries.

    Gathered or passed around a ring, each device receives those of all others once per layer.
    """
    ours = slice_sent(config, load, mesh)
    L, H, b = config.num_layers, config.head_dim, load.itemsize
    n, k = config.num_heads / mesh.tensor, config.num_kv_heads / mesh.tensor
    t, others = load.slice_len / mesh.seq, mesh.seq - 1
    queries = others * t * ((L - 1) * (2 * n * H * b + n * _FLOAT32) + 2 * L * k * H * b)
    return ours - queries + (L - 1) * 2 * load.tokens / mesh.seq * others * k * H * b


def of_token(config: ModelConfig, load: Workload, mesh: MeshShape) -> Cost:
    """Computes the cost of the decode step of the workload's last token."""
    L, D, H, b = config.num_layers, config.embed_dim, config.head_dim, load.itemsize
    n, shares = config.num_heads / mesh.tensor, mesh.seq * mesh.tensor
    linear = 2 * (L * budget.block(config) / mesh.tensor + D * config.vocab_size / mesh.tensor)
    attention = 4 * L * config.num_heads * H * load.tokens / shares
    summed = 2 * (mesh.tensor - 1) / mesh.tensor
    sent = summed * ((2 * L + 1) * D * b + config.vocab_size * _FLOAT32)
    sent += (mesh.seq - 1) * L * n * (H + 1) * _FLOAT32
    return Cost(linear + attention, budget.decode_bytes(config, load, mesh), sent)
