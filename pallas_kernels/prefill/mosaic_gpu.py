"""Prefill for NVIDIA Hopper: one Mosaic GPU kernel, dense or by a plan, over the cache in place.

A block of three warpgroups stays on each multiprocessor and takes items, tiles of rows of a head,
in turn. One warpgroup fetches keys and values, two attend for 64 rows each: `mosaic_gpu_block`
says what they share, `mosaic_gpu_fetch` which keys come when, `mosaic_gpu_attend` what is done
with them.

The keys of an item fall into the regions of Dual Chunk Attention, each with one view of its
queries. Blocks that a mask or a border of chunks cuts come after those that all rows see, then
columns. How many steps each takes is computed outside the kernel. Columns of a plan are packed
beforehand, for Hopper cannot gather; so is the step that the end of the sequence cuts, whose stale
rows must not meet the tensor cores, where 0 x nan is nan.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import plan as plans
from pallas_kernels.dispatch.backend import HOPPER_HEADS, Unsupported
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.mosaic_gpu import call
from pallas_kernels.mosaic_gpu.call import WARPGROUP, Warpgroup
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import SparsePlan
from pallas_kernels.prefill.mosaic_gpu_attend import attend
from pallas_kernels.prefill.mosaic_gpu_block import COLUMNS, READERS, ROWS, Inputs, Scratch, Shape
from pallas_kernels.prefill.mosaic_gpu_fetch import fetch
from pallas_kernels.prefill.packed import pack
from pallas_kernels.regions import tile_ends
from pallas_kernels.shard import WHOLE, Shard

BLOCKS = 132
"""Multiprocessors of an H100 and of an H200; where there are fewer, some blocks wait."""
LEAST, WIDTH = 64, 128
"""Keys a step, at least on a GPU and at most."""
HELD = 256
"""Keys in shared memory: two steps of `WIDTH`, or more of fewer keys, up to `STAGES`."""
STAGES = 8
TILE = READERS * ROWS
EVEN = 16
"""Items whose steps differ by less than one in this many of the most count as equally long."""


def prefill(
    queries: Float[Array, "views T N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    plan: SparsePlan | None = None,
    shard: Shard = WHOLE,
    width: int = WIDTH,
    stages: int | None = None,
    blocks: int = BLOCKS,
    interpret: Any = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """See `api.prefill`. Holds the packed columns of a plan.

    Slices shorter than a tile join the heads of a kv head to its rows.

    Args:
        width: keys a step at most.
        stages: steps whose keys are in shared memory, at least 2; None for `HELD` keys.
        blocks: thread blocks that share the items.
        interpret: result of `mosaic_gpu.call.interpreter`, to run on a CPU.

    Raises:
        Unsupported: if heads are of no size in `HOPPER_HEADS`, anything is not bfloat16, a page or
            a block of the plan is no multiple of `LEAST` keys, blocks of the plan cross pages, or
            the cache has more rows than 32 bits count.
    """
    keys, values = cache.keys, cache.values
    views, T, N, H = queries.shape
    L, K, pages, page, _ = keys.shape
    if H not in HOPPER_HEADS:
        raise Unsupported(f"heads of {H} are none of {', '.join(map(str, HOPPER_HEADS))}")
    if not queries.dtype == keys.dtype == values.dtype == jnp.bfloat16:
        raise Unsupported(
            f"queries of {queries.dtype}, keys of {keys.dtype}, values of {values.dtype}: "
            "not all bfloat16"
        )
    block = page if plan is None else plan.tiles.k
    width = math.gcd(block, width)
    if page % block or (interpret is None and width % LEAST):
        raise Unsupported(
            f"blocks of {block} keys in pages of {page}: not whole steps of {LEAST} keys each"
        )
    if L * K * pages * page >= 2**31:
        raise Unsupported(f"a cache of {L * K * pages * page} rows: more than 32 bits count")

    group = N // K if plan is None and T < TILE else 1
    tile = TILE if plan is None else plan.tiles.q
    rows, padded = _rows(queries, group, tile)
    heads, num_tiles = rows.shape[2], rows.shape[1] // padded
    end = start + length
    last_step = shard.before(end) // width
    tails = _tails(cache, layer, page_table, shard.before(end), last_step, width)
    given = [jnp.stack([layer, start, length, last_step, *shard.scalars()]), page_table]
    extra = []
    first = jnp.arange(num_tiles, dtype=jnp.int32)[:, None] * tile
    first = first + jnp.arange(0, padded, TILE, dtype=jnp.int32)
    items = item_table(first, tile, group, start, length, width, geometry, shard, plan, heads)
    if plan is not None:
        packed = pack(plan, cache, layer, page_table, end, width=width, shard=shard)
        steps = packed.local.shape[1] // width
        covered = plans.covered(plan, packed.local)
        extra = [
            jax.lax.bitcast_convert_type(plan.blocks, jnp.int32),
            packed.keys.reshape(-1, H),
            packed.values.reshape(-1, H),
            packed.positions.reshape(N, steps, width),
            jax.lax.bitcast_convert_type(covered, jnp.int32).reshape(N, -1, steps, width),
        ]
    blocks = min(blocks, len(items))
    shape = Shape(
        blocks=blocks,
        items=len(items),
        views=views,
        group=group,
        heads_per_kv=heads // K,
        kv_heads=K,
        head_dim=H,
        pages=pages,
        page=page,
        width=width,
        block=width if plan is None else block,
        stages=stages or min(HELD // width, STAGES),
        geometry=geometry,
        shard=shard,
        unit=Warpgroup(interpreted=interpret is not None),
    )

    def kernel(*refs, **scratch):
        *inputs, out, lse = refs
        args = shape, Inputs(*inputs), Scratch(**scratch)
        reads = jax.lax.axis_index(WARPGROUP) < READERS
        jax.lax.cond(reads, lambda: attend(*args, out, lse), lambda: fetch(*args))

    out, lse = call.launch(
        kernel,
        *given,
        items,
        rows,
        keys.reshape(-1, H),
        values.reshape(-1, H),
        *tails,
        *extra,
        outputs=[
            jax.ShapeDtypeStruct(rows.shape[1:], queries.dtype),
            jax.ShapeDtypeStruct((heads, rows.shape[1]), jnp.float32),
        ],
        scratch=shape.scratch(queries.dtype),
        blocks=blocks,
        warpgroups=READERS + 1,
        name="prefill_dense" if plan is None else "prefill_sparse",
        interpret=interpret,
    )
    return _unpadded(out, T, N, tile, padded), _unpadded(lse.T, T, N, tile, padded)


def _rows(queries, group: int, tile: int):
    """Rows [views, rows, heads, H] of queries, each tile padded to whole items; its rows then."""
    views, T, _, H = queries.shape
    rows = queries.reshape(views, T, -1, group, H).swapaxes(2, 3)
    rows = rows.reshape(views, T * group, -1, H)
    total = rows.shape[1]
    count, padded = -(-total // tile), -(-tile // TILE) * TILE
    rows = jnp.pad(rows, ((0, 0), (0, count * tile - total), (0, 0), (0, 0)))
    rows = rows.reshape(views, count, tile, -1, H)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padded - tile), (0, 0), (0, 0)))
    return rows.reshape(views, count * padded, -1, H), padded


def _unpadded(x, T: int, N: int, tile: int, padded: int):
    """Undo the padding and grouping of `_rows`."""
    heads, rest = x.shape[1], x.shape[2:]
    group = N // heads
    x = x.reshape(-1, padded, heads, *rest)[:, :tile].reshape(-1, heads, *rest)[: T * group]
    return x.reshape(T, group, heads, *rest).swapaxes(1, 2).reshape(T, N, *rest)


def _tails(cache: PagedKV, layer, page_table, end, step, width: int):
    """Keys and values [K * width, H] of the step that the end of the sequence cuts, zero after."""
    page, H = cache.keys.shape[3:]
    local = step * width + jnp.arange(width, dtype=jnp.int32)
    at = jnp.minimum(local, page_table.size * page - 1)
    there = (local < end)[:, None]
    index = layer, slice(None), page_table[at // page], at % page
    return [
        jnp.where(there, array[index].swapaxes(0, 1), 0).reshape(-1, H)
        for array in (cache.keys, cache.values)
    ]


def item_table(first, tile, group, start, length, width, geometry, shard, plan, heads):
    """The table [items, columns] of `mosaic_gpu_block`, the longest items first.

    Args:
        first: row [tiles, items of a tile] that each begins with.
    """
    of_tile = jnp.arange(first.size, dtype=jnp.int32).reshape(first.shape) // first.shape[1]
    final = jnp.minimum(first + TILE, (of_tile + 1) * tile) - 1
    block = width if plan is None else plan.tiles.k
    stops, end = tile_ends(
        first // group,
        final // group,
        block,
        start=start,
        length=length,
        geometry=geometry,
        shard=shard,
    )
    stops = jnp.concatenate([stops, -(-end[..., None] // block)], -1)
    stops = jnp.broadcast_to(stops, (heads, *stops.shape))
    columns = jnp.zeros((heads, *first.shape), jnp.int32)
    if plan is not None:
        stops = plan.before(stops) * (block // width)
        # Without a loop, whose steps would each be a program on the GPU.
        before = functools.partial(jnp.searchsorted, method="scan_unrolled")
        before = jax.vmap(before, (0, None))(plan.columns, end).astype(jnp.int32)
        columns = -(-before // width)
    row = of_tile * (first.shape[1] * TILE) + (first - of_tile * tile)
    last = jnp.minimum(final // group, length - 1)
    head = jnp.arange(heads, dtype=jnp.int32)[:, None, None]
    table = jnp.broadcast_arrays(head, row, first, last, of_tile, columns)
    table = jnp.concatenate([jnp.stack(table, -1), stops], -1)
    # The last tiles see the most keys. Heads of one tile follow one another: they read the same.
    table = table.reshape(heads, first.size, -1)[:, ::-1].swapaxes(0, 1)
    table = table.reshape(-1, table.shape[-1])
    if plan is None:
        return table
    steps = table[:, -1] + table[:, COLUMNS]
    rank = steps * EVEN // jnp.maximum(steps.max(), 1)
    return table[jnp.argsort(-rank, stable=True)]
