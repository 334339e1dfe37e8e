"""Decode for TPU: split-KV flash decoding of paged keys, each fetched from HBM once.

The blocks of keys of all busy sequences, in order, are one list of steps; each core takes an
equal run of it. A step waits for its block, all kv heads of it, and has the next one on its
way, be it of the next sequence. All query heads and tokens of a kv head are rows of one
product. A block before all tokens and in one region of Dual Chunk Attention (arXiv:2402.17463)
goes through a body without masks that only picks the view of the queries; blocks that the end
of the sequence or a border of chunks cuts go through a general one, as far as they are filled.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax
from pallas_kernels.dispatch.backend import LANES, Unsupported
from pallas_kernels.geometry import INTER, INTRA, ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.shard import WHOLE, Shard

SUBLANES = 8  # the other one, in 32-bit rows
BLOCK_BYTES = 2**20  # of keys a step, and of values as many
GRANULE = 128  # keys to which the fetch of a sequence's end is rounded up
SUB_BLOCK = 512  # keys a step of the general body


def decode(
    queries: Float[Array, "views B Q N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, "B P"],
    positions: Int[Array, "B Q"],
    *,
    geometry: ChunkGeometry | None,
    shard: Shard = WHOLE,
    block_bytes: int = BLOCK_BYTES,
    cores: int = 1,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B Q N"]]:
    """See `api.decode`.

    Args:
        block_bytes: bytes of keys per step; two blocks of keys and two of values are held at once.
        cores: number of cores that share a device's memory and split the keys between them.

    Raises:
        Unsupported: if heads do not fill a row of lanes, or pages do not fill rows.
    """
    keys, values = cache.keys, cache.values
    _, B, Q, N, H = queries.shape
    K, page = keys.shape[1], keys.shape[3]
    if H > LANES or (H < LANES and not interpret):
        raise Unsupported(
            f"head_dim={H} must be {LANES}: one row of lanes, lest a padded copy of the cache "
            "be laid out"
        )
    if page % LANES and LANES % page:
        raise Unsupported(
            f"{page=} must divide {LANES} or be a multiple of it: scores lie in rows of {LANES}"
        )
    block = block_of(
        page, page_table.shape[1], K * H * keys.dtype.itemsize, block_bytes=block_bytes
    )
    rows = _up(Q * (N // K), SUBLANES)

    lens = shard.before(positions.max(1) + 1)
    ends = jnp.cumsum(-(-lens // block), dtype=jnp.int32)
    busy = jnp.where(lens > 0, jnp.arange(B, dtype=jnp.int32), B)
    after = jnp.append(jax.lax.cummin(busy, reverse=True)[1:], jnp.int32(B))

    q = _rows(queries, K, rows)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, geometry=geometry, shard=shard, cores=cores, group=N // K),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(cores, B),
            in_specs=[
                pl.BlockSpec((None, *q.shape[1:]), lambda _, b, *scalars: (b, 0, 0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[
                pl.BlockSpec((None, None, K, rows, H), lambda c, b, *scalars: (c, b, 0, 0, 0)),
                pl.BlockSpec((None, None, K, rows, 1), lambda c, b, *scalars: (c, b, 0, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, K, block, H), keys.dtype),
                pltpu.VMEM((2, K, block, H), values.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.VMEM((K, rows, LANES), jnp.float32),  # m
                pltpu.VMEM((K, rows, LANES), jnp.float32),  # l
                pltpu.VMEM((K, rows, H), jnp.float32),  # acc
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((cores, B, K, rows, H), jnp.float32),
            jax.ShapeDtypeStruct((cores, B, K, rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode",
    )(
        jnp.stack([layer, *shard.scalars()]),
        lens,
        ends,
        after,
        positions,
        page_table,
        q,
        keys,
        values,
    )
    out, lse = functools.reduce(
        lambda a, b: softmax.merge(*a, *b), zip(out, lse[..., 0], strict=True)
    )
    out = out[:, :, : Q * (N // K)].reshape(B, K, Q, N // K, H).swapaxes(1, 2)
    lse = lse[:, :, : Q * (N // K)].reshape(B, K, Q, N // K).swapaxes(1, 2)
    return out.reshape(B, Q, N, H).astype(queries.dtype), lse.reshape(B, Q, N)


def block_of(page: int, num_pages: int, token_bytes: int, *, block_bytes: int = BLOCK_BYTES) -> int:
    """Keys a step: whole pages, or the part of one that is a multiple of the lanes."""
    most = max(block_bytes // token_bytes, LANES)
    if page <= most:
        unit = max(page, LANES)
        return unit * min(most // unit, -(-num_pages * page // unit))
    return max(d for d in range(LANES, most + 1, LANES) if page % d == 0)


def fetched(kv_len, j, *, page: int, block: int):
    """Keys of block j of a sequence that are read from HBM; on numpy and jax arrays alike."""
    granule = math.gcd(GRANULE, page)
    return _up(kv_len - j * block, granule).clip(0, block)


def _up(size, unit):
    return -(-size // unit) * unit


def _rows(queries, K, rows):
    """Queries [views, B, Q, N, H] as [B, K, views, rows, H]: the heads of a token together."""
    views, B, Q, N, H = queries.shape
    q = queries.reshape(views, B, Q, K, N // K, H).transpose(1, 3, 0, 2, 4, 5)
    q = q.reshape(B, K, views, Q * (N // K), H)
    return jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, rows - q.shape[3]), (0, 0)))


def _kernel(
    where_ref,
    lens_ref,
    ends_ref,
    after_ref,
    positions_ref,
    table_ref,
    q_ref,
    keys_ref,
    values_ref,
    out_ref,
    lse_ref,
    k_buf,
    v_buf,
    arrived,
    m_ref,
    l_ref,
    acc_ref,
    *,
    geometry: ChunkGeometry | None,
    shard: Shard,
    cores: int,
    group: int,
):
    """One sequence on one core. Keys go by their local index; positions are of the sequence.

    Args:
        where_ref: the layer, and of a shard its index.
        lens_ref: keys of each sequence.
        ends_ref: steps of all sequences up to and with each.
        after_ref: the next busy sequence after each.
    """
    core, b = pl.program_id(0), pl.program_id(1)
    B, Q = positions_ref.shape
    K, rows, H = out_ref.shape
    block, page = k_buf.shape[2], keys_ref.shape[3]
    sub = math.gcd(SUB_BLOCK, block)
    piece = min(page, block)
    granule = math.gcd(GRANULE, page)
    shard = shard.inside(where_ref, 1)
    oldest, kv_len = positions_ref[b, 0], lens_ref[b]

    def newest():
        if shard.count == 1:
            return kv_len - 1
        return functools.reduce(jnp.maximum, [positions_ref[b, t] for t in range(Q)])

    # Steps of this core; of them, blocks of this sequence.
    first, last = (ends_ref[B - 1] * c // cores for c in (core, core + 1))
    done = ends_ref[b] - pl.cdiv(kv_len, block)
    begin, end = jnp.maximum(first - done, 0), jnp.minimum(ends_ref[b], last) - done

    def transfer(do, b, j, slot):
        """Start or await the copies of one block: of whole pages, then of granules of one."""
        count = fetched(lens_ref[b], j, page=page, block=block)

        def copy(offset, size):
            k_pos = j * block + offset
            page_id = table_ref[b, k_pos // page]
            for which, (cache, buf) in enumerate([(keys_ref, k_buf), (values_ref, v_buf)]):
                do(
                    pltpu.make_async_copy(
                        cache.at[where_ref[0], :, page_id, pl.ds(k_pos % page, size)],
                        buf.at[slot, :, pl.ds(offset, size)],
                        arrived.at[slot, which],
                    )
                )

        whole = count // piece
        pl.loop(0, whole)(lambda i: copy(pl.multiple_of(i * piece, piece), piece))
        rest = pl.loop(whole * piece // granule, count // granule)
        rest(lambda i: copy(pl.multiple_of(i * granule, granule), granule))

    start = functools.partial(transfer, lambda copy: copy.start())
    wait = functools.partial(transfer, lambda copy: copy.wait())

    def update(head, s, v):
        """The state after the keys of scores `s` [rows, S], of which masked ones hold MASKED."""
        m_old = m_ref[head]
        m = jnp.maximum(m_old, jnp.broadcast_to(s.max(1, keepdims=True), m_old.shape))
        p = jnp.exp(s - jnp.concatenate([m] * (s.shape[1] // LANES), 1))
        decay = jnp.exp(m_old - m)
        m_ref[head] = m
        l_ref[head] = decay * l_ref[head] + jnp.broadcast_to(p.sum(1, keepdims=True), m.shape)
        acc_ref[head] = decay[:, :H] * acc_ref[head] + _dot(p.astype(v.dtype), v, ((1,), (0,)))

    def scores(view, head, k):
        return _dot(q_ref[head, view], k, ((1,), (1,)))

    def whole(view, slot):
        for head in range(K):
            update(head, scores(view, head, k_buf[slot, head]), v_buf[slot, head])

    def general(j, slot):
        @pl.loop(0, pl.cdiv(jnp.minimum(kv_len - j * block, block), sub))
        def _sub_block(i):
            here = pl.ds(pl.multiple_of(i * sub, sub), sub)
            k_first = j * block + i * sub
            key = k_first + jax.lax.broadcasted_iota(jnp.int32, (rows, sub), 1)
            exists = jax.lax.broadcasted_iota(jnp.int32, (sub, H), 0) < kv_len - k_first

            def attend(view, visible):
                for head in range(K):
                    s = scores(view, head, k_buf[slot, head, here])
                    # 0 x nan of a stale row is nan
                    v = jnp.where(exists, v_buf[slot, head, here], 0)
                    update(head, jnp.where(visible, s, softmax.MASKED), v)

            if geometry is None:
                attend(INTRA, key <= last_key)
                return
            k_last = jnp.minimum(k_first + sub, kv_len) - 1
            nearest = geometry.view(oldest, shard.position(k_last))
            farthest = geometry.view(newest(), shard.position(k_first))

            @pl.loop(nearest, farthest + 1)
            def _view(view):
                bottom, top = chunk(view)
                top = jnp.minimum(last_key, top)
                attend(view, (key <= top) & ((key >= bottom) | (view == INTER)))

    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)

    def of_rows(of_position):
        """A function of each row's position; -1 in rows of no token."""
        found = jnp.full((rows, 1), -1, jnp.int32)
        for t in range(Q):
            mine = (row >= t * group) & (row < (t + 1) * group)
            found = jnp.where(mine, of_position(positions_ref[b, t]), found)
        return found

    last_key = of_rows(shard.upto)  # that each row may see, -1 in idle ones
    if geometry is not None:
        L = geometry.chunk_len
        starts = of_rows(lambda position: position // L * L)

    def chunk(view):
        """The first and the last key of the chunk that each row sees in a view."""
        if shard.count == 1:
            bottom = starts - view * L
            return bottom, bottom + L - 1
        return (
            of_rows(lambda position: shard.before((position // L - view) * L)),
            of_rows(lambda position: shard.upto((position // L - view + 1) * L - 1)),
        )

    @pl.when(begin < end)
    def _busy():
        m_ref[...] = jnp.full(m_ref.shape, softmax.MASKED, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

        @pl.when(done + begin == first)
        def _start_first():
            start(b, begin, first % 2)

        @pl.loop(begin, end)
        def _step(j):
            step = done + j
            slot = step % 2

            @pl.when(step + 1 < last)
            def _start_next():
                same = j + 1 < ends_ref[b] - done
                start(jnp.where(same, b, after_ref[b]), jnp.where(same, j + 1, 0), 1 - slot)

            wait(b, j, slot)
            plain, view = (j + 1) * block <= shard.before(oldest + 1), INTRA
            if geometry is not None:
                view = geometry.view(oldest, shard.position((j + 1) * block - 1))
                plain &= view == geometry.view(newest(), shard.position(j * block))
            pl.when(plain)(lambda: whole(view, slot))
            pl.when(~plain)(lambda: general(j, slot))

        seen = (m_ref[...] > softmax.MASKED) & (last_key >= 0)
        l = jnp.where(seen, l_ref[...], 1.0)
        out_ref[...] = jnp.where(seen[..., :1], acc_ref[...] / l[..., :1], 0.0)
        lse_ref[...] = jnp.where(seen, m_ref[...] + jnp.log(l), -jnp.inf)[..., :1]

    @pl.when(begin >= end)
    def _idle():
        out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)
        lse_ref[...] = jnp.full(lse_ref.shape, -jnp.inf, jnp.float32)


def _dot(a, b, contracted):
    """Product in float32, of float32 with all its bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
