"""Prefill for TPU: one kernel, dense or by a plan, over the paged cache where it lies.

A grid step attends for one tile of queries. It walks over steps of keys; a step is made of
pieces that each lie in one page, copied to VMEM while the step before is computed. Without
a plan the pieces follow one another and the heads of a kv head join the rows of a tile; with
one a tile has one head, its pieces are the blocks of the plan, and the single columns come
last, packed. `mosaic_tpu_sweep` says which keys come when, `mosaic_tpu_tile` attends.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import plan as plans
from pallas_kernels.dispatch.backend import Unsupported, check_heads
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import SparsePlan
from pallas_kernels.prefill.mosaic_tpu_sweep import WORD, dense, sparse
from pallas_kernels.prefill.mosaic_tpu_tile import LANES, Shape
from pallas_kernels.prefill.packed import pack
from pallas_kernels.shard import WHOLE, Shard

TILES = Tiles(q=1792, k=2048)
STEP = 2048  # listed keys a step
VMEM_BYTES = 32 * 2**20


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
    tiles: Tiles = TILES,
    step: int = STEP,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """See `api.prefill`. In HBM it holds the queries head by head, and packed columns of a plan.

    A plan takes 8 bytes of scalar memory for each block of the context: 64 KiB for a million
    keys in blocks of 128. Blocks of 256 lose less to starting copies than smaller ones.

    Args:
        tiles: tile sizes without a plan, which has its own; rounded to whole registers.
        step: keys per step with a plan.

    Raises:
        Unsupported: if a step of keys is not whole registers or blocks of the plan do not
            divide it and the page, if the heads are wider than a register but not whole
            ones, or, on a TPU, if a piece is smaller than a register.
    """
    keys, values = cache.keys, cache.values
    views, T, N, H = queries.shape
    _, K, _, page, _ = keys.shape
    if plan is None:
        G, width = N // K, tiles.k
        q = min(max(tiles.q // G // LANES, 1), pl.cdiv(T, LANES)) * LANES
        piece, rows_of_head = math.gcd(page, width), q
    else:
        G, width, q, piece = 1, step, plan.tiles.q, plan.tiles.k
        rows_of_head = pl.cdiv(q, LANES) * LANES
    if width % LANES or width % piece or page % piece:
        raise Unsupported(f"a step of {width} keys in pieces of {piece} and pages of {page}")
    least = 32 // keys.dtype.itemsize
    if not interpret and piece % least:
        raise Unsupported(f"pieces of {piece} keys; a TPU copies whole tiles of {least}")
    if not interpret:
        check_heads(H)
    if H > LANES and H % LANES:
        raise Unsupported(f"a head_dim of {H}: neither within {LANES} nor a multiple of it")
    heads, count = N // G, pl.cdiv(T, q)
    shape = Shape(
        q=q,
        rows_of_head=rows_of_head,
        group=G,
        width=width,
        piece=piece,
        page=page,
        kv_heads=K,
        kv_group=heads // K,
        geometry=geometry,
        shard=shard,
    )
    if shape.sub % piece and piece % shape.sub:
        raise Unsupported(f"pieces of {piece} keys, of which none ends where {shape.sub} do")
    M = shape.rows

    rows = jnp.pad(queries, ((0, 0), (0, count * q - T), (0, 0), (0, 0))).swapaxes(1, 2)
    if rows_of_head > q:
        rows = rows.reshape(views, N, count, q, H)
        rows = jnp.pad(rows, ((0, 0),) * 3 + ((0, rows_of_head - q), (0, 0)))
        rows = rows.reshape(views, N, count * rows_of_head, H)

    where = jnp.stack([layer, start, length, *shard.scalars()])
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    in_specs = [
        pl.BlockSpec((views, G, rows_of_head, H), lambda n, i, *_: (0, n, i, 0)),
        anywhere,
        anywhere,
    ]
    # A view: rows of pages lie one after another.
    args = [rows, *(x.reshape(-1, x.shape[2] * page, H) for x in (keys, values))]
    scratch = [
        pltpu.VMEM((views, M, H), queries.dtype),  # queries for logits to base 2
        pltpu.VMEM((2, width, H), keys.dtype),
        pltpu.VMEM((2, width, H), values.dtype),
        pltpu.VMEM((M, LANES), jnp.float32),  # m: running maximum, in every lane
        pltpu.VMEM((M, LANES), jnp.float32),  # l: running sum, a part in each lane
        pltpu.VMEM((M, H), jnp.float32),  # acc: unnormalised output
        pltpu.VMEM((2, shape.chunk, shape.sub), jnp.float32),  # logits
        # Their exponentials, in words: whole registers are written.
        pltpu.VMEM((2, shape.chunk * values.dtype.itemsize // 4, shape.sub), jnp.uint32),
        pltpu.VMEM((2, shape.chunk, LANES), jnp.float32),  # decay of the output
        pltpu.VMEM((width // shape.sub, 1, shape.sub), jnp.int32),  # positions of keys
        pltpu.SemaphoreType.DMA((2,)),
    ]
    if plan is not None:
        listed = _listed(plan, cache, layer, page_table, start + length, width, shard)
        args += listed
        columns, covered = listed[2], listed[3]
        in_specs += [
            anywhere,
            anywhere,
            pl.BlockSpec((None, *columns.shape[1:]), lambda n, i, *_: (n, 0, 0, 0)),
            pl.BlockSpec(
                (None, None, *covered.shape[2:]), lambda n, i, *_: (n, i // WORD, 0, 0, 0)
            ),
            _in_smem(listed[4], lambda n, i, *_: (n, 0, 0)),
            _in_smem(listed[5], lambda n, i, *_: (n, i, 0, 0)),
        ]
        # Numbers of the blocks that a tile reads, and their rows in the cache.
        scratch += 2 * [pltpu.SMEM(((plan.blocks.shape[2] + 1) * WORD,), jnp.int32)]
    out, lse = pl.pallas_call(
        functools.partial(dense if plan is None else sparse, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(heads, count),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((G, rows_of_head, H), lambda n, i, *_: (n, i, 0)),
                pl.BlockSpec((None, None, M // LANES, LANES), lambda n, i, *_: (n, i, 0, 0)),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((N, count * rows_of_head, H), queries.dtype),
            jax.ShapeDtypeStruct((heads, count, M // LANES, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),  # each core takes some tiles
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=interpret,
        name="prefill_dense" if plan is None else "prefill_sparse",
    )(where, page_table, *args)
    if rows_of_head > q:
        out = out.reshape(N, count, rows_of_head, H)[:, :, :q].reshape(N, count * q, H)
    lse = lse.reshape(heads, count, G, rows_of_head)[:, :, :, :q]
    lse = lse.transpose(1, 3, 0, 2).reshape(count * q, N)
    return out.swapaxes(0, 1)[:T], lse[:T]


def _in_smem(array, index_map):
    block = tuple(None if d < array.ndim - 2 else s for d, s in enumerate(array.shape))
    return pl.BlockSpec(block, index_map, memory_space=pltpu.SMEM)


def _listed(plan: SparsePlan, cache: PagedKV, layer, page_table, kv_len, width, shard):
    """Arrays that the kernel reads of a plan: packed columns, their positions, bits of blocks.

    Returns:
        keys and values of the columns [N, columns, H], zero where there is none; their
        positions [N, steps, 1, width]; bits [N, words, steps, 1, width], of which bit b of
        word w says that tile 32 w + b reads the column's block; first and last position
        of each step [N, 1, 2 steps]; the bits of blocks [N, tiles, 1, words].
    """
    packed = pack(plan, cache, layer, page_table, kv_len, width=width, shard=shard)
    N, V = packed.local.shape
    steps = V // width
    covered = jax.lax.bitcast_convert_type(plans.covered(plan, packed.local), jnp.int32)
    positions = packed.positions.reshape(N, steps, 1, width)
    spans = jnp.stack([positions[:, :, 0, 0], positions[:, :, 0, -1]], -1)
    return [
        packed.keys,
        packed.values,
        positions,
        covered.reshape(N, -1, steps, 1, width),
        spans.reshape(N, 1, 2 * steps),
        jax.lax.bitcast_convert_type(plan.blocks, jnp.int32)[:, :, None],
    ]
