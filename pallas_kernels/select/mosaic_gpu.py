"""The vote of a slice's last queries for Hopper GPUs: two kernels to which TMA streams the keys.

The first finds each row's log-sum-exp, the second adds up the weights by column and by diagonal. A
block of either takes one page for one query head; those of the heads that share keys follow each
other. Logits leave the tensor cores for registers, so that the next tile of keys may come in while
they are used. Rows lie last query first, so that row i of the weights moves by i places to where
its diagonals end in the last query's row: weights go through shared memory, and are read there
from i places before. What falls past a page is handed on by a `Shard`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch.backend import HOPPER_HEADS, Unsupported
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.mosaic_gpu import call
from pallas_kernels.mosaic_gpu.call import BLOCK, ROWS, TILED, Warpgroup
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.regions import row_ends
from pallas_kernels.shard import WHOLE, Shard

VOTERS = 64  # rows of a product
TILE = 128  # keys a step, one for each thread of a warpgroup
STRIDE = VOTERS + TILE + 8
"""Numbers from one row of weights to the next, at which no two rows of 4 share banks of memory."""
LOG2E = math.log2(math.e)
START = -1e30
"""A running maximum before the first key; masked logits are -inf, and -inf - -inf is nan."""
THREADS: Any = plgpu.Layout.WG_STRIDED((TILE,), vec_size=1)
"""Layout of a vector with a number for each thread."""


def vote(
    queries: Float[Array, "views R N H"],
    cache: PagedKV,
    layer: Int[Array, ""],
    page_table: Int[Array, " P"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    geometry: ChunkGeometry | None,
    shard: Shard = WHOLE,
    interpret: Any = None,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """Sums of softmax weights by column and by diagonal; see `api.select`.

    Raises:
        Unsupported: if heads are not of 64 or 128, arrays not of one dtype of 16 bits, pages not
            made of whole tiles, or there are more than 64 rows.
    """
    keys = cache.keys
    _, R, N, H = queries.shape
    _, K, pages, page, _ = keys.shape
    P = page_table.shape[0]
    if H not in HOPPER_HEADS:
        raise Unsupported(f"head_dim={H} must be one of {', '.join(map(str, HOPPER_HEADS))}")
    if queries.dtype != keys.dtype or keys.dtype.itemsize != 2:
        raise Unsupported(
            f"queries are {queries.dtype}, keys {keys.dtype}; one dtype of 16 bits is needed"
        )
    if page % TILE:
        raise Unsupported(f"{page=} must be a multiple of {TILE}: a step copies its keys at once")
    if R > VOTERS:
        raise Unsupported(f"{R=} rows must be at most {VOTERS}: those of one product")

    row, end = jnp.arange(VOTERS, dtype=jnp.int32), start + length
    votes = row < jnp.minimum(R, length)
    # Rows without a vote see what the first that votes sees, and are left out of the sums.
    first = jnp.minimum(jnp.maximum(start, end - R), end - 1)
    seen = row_ends(jnp.maximum(end - 1 - row, first), geometry, shard)
    q = jnp.pad(queries[:, ::-1], ((0, 0), (0, VOTERS - R), (0, 0), (0, 0))).swapaxes(1, 2)
    given = (
        layer.reshape(1),
        page_table,
        seen.min(1),
        seen.max(1),
        jnp.pad(seen, ((0, 1), (0, 0))),  # one view more, in which no keys lie
        q,
        keys.reshape(-1, H),
    )
    launch = functools.partial(call.launch, blocks=N * P, warpgroups=1, interpret=interpret)
    sizes = {"warpgroup": Warpgroup(interpret is not None), "K": K, "pages": pages, "page": page}
    scratch = {
        "q_smem": plgpu.SMEM((VOTERS, H), keys.dtype, transforms=TILED),
        "k_smem": plgpu.SMEM((TILE, H), keys.dtype, transforms=TILED),
        "q_full": plgpu.Barrier(num_arrivals=1),
        "k_full": plgpu.Barrier(num_arrivals=1),
    }
    (lse,) = launch(
        functools.partial(_row_lse, **sizes),
        *given,
        outputs=[jax.ShapeDtypeStruct((N, P, VOTERS), jnp.float32)],
        scratch=scratch,
        name="select_row_lse",
    )
    lse = shard.merge_lse(jax.nn.logsumexp(lse, axis=1))
    lse = jnp.where(votes, lse, jnp.inf)
    of_tiles = jax.ShapeDtypeStruct((N, P, page // TILE, TILE), jnp.float32)
    columns, diagonals, over = launch(
        functools.partial(_sums, **sizes),
        *given,
        lse * LOG2E,
        outputs=[of_tiles, of_tiles, jax.ShapeDtypeStruct((N, P, TILE), jnp.float32)],
        scratch=scratch | {"p_smem": plgpu.SMEM((VOTERS, STRIDE), jnp.float32)},
        name="select_sums",
    )
    diagonals += shard.shift_overflow(over[..., :R], page).reshape(diagonals.shape)
    return columns.reshape(N, -1), diagonals.reshape(N, -1)


def _stream(
    layer_ref,
    table_ref,
    whole_ref,
    cut_ref,
    ends_ref,
    q_ref,
    keys_ref,
    *,
    q_smem,
    k_smem,
    q_full,
    k_full,
    warpgroup: Warpgroup,
    K: int,
    pages: int,
    page: int,
):
    """The head and page of a block, how many tiles of it have keys, and a loop over them.

    Args:
        whole_ref: end of the keys that all rows see in each view.
        cut_ref: end of the keys that any row sees in each view.
        ends_ref: end of the keys that each row sees in each view but the last.

    Returns:
        The loop takes a function of a tile's number, its logits [VOTERS, TILE] and a state, and
        the state at first.
    """
    views, N = q_ref.shape[:2]
    block = lax.axis_index(BLOCK)
    n, number = lax.rem(block, N), lax.div(block, N)
    head = layer_ref[0] * K + lax.div(n, N // K)
    start, base = number * page, (head * pages + table_ref[number]) * page
    count = pl.cdiv(jnp.clip(cut_ref[0] - start, 0, page), TILE)

    def needed(first, size):
        """The views in which any row sees any of the keys from the first on."""
        near = sum((whole_ref[v] >= first + size).astype(jnp.int32) for v in range(1, views))
        far = sum((cut_ref[v] > first).astype(jnp.int32) for v in range(views))
        return jnp.int32(near), far

    near, far = needed(start, page)
    plain = (far == near + 1) & (whole_ref[near] >= start + page)

    def fetch(view):
        plgpu.copy_gmem_to_smem(q_ref.at[view, n], q_smem, q_full)
        plgpu.barrier_wait(q_full)

    def request(j):
        plgpu.copy_gmem_to_smem(keys_ref.at[pl.ds(base + j * TILE, TILE)], k_smem, k_full)

    def masked(j):
        first = start + j * TILE
        key = first + warpgroup.iota((VOTERS, TILE), 1)

        def of_view(view, s):
            fetch(view)
            stop, begin = (
                lax.broadcast_in_dim(warpgroup.vector(ends_ref.at[each], ROWS), s.shape, (0,))
                for each in (view, view + 1)
            )
            seen = (key >= begin) & (key < stop)
            return jnp.where(seen, warpgroup.logits(q_smem, k_smem), s)

        none = warpgroup.full((VOTERS, TILE), -jnp.inf)
        return lax.fori_loop(*needed(first, TILE), of_view, none)

    def loop(visit, state):
        pl.when(plain)(lambda: fetch(near))
        pl.when(count > 0)(lambda: request(0))

        def step(j, state):
            plgpu.barrier_wait(k_full)
            s = lax.cond(plain, lambda: warpgroup.logits(q_smem, k_smem), lambda: masked(j))
            pl.when(j + 1 < count)(lambda: request(j + 1))
            return visit(j, s, state)

        return lax.fori_loop(0, count, step, state)

    return n, number, count, loop


def _row_lse(*refs, warpgroup: Warpgroup, **rest):
    """Log-sum-exp [N, P, VOTERS] of each row over one page."""
    *given, lse_ref = refs
    n, number, _, loop = _stream(*given, warpgroup=warpgroup, **rest)

    def more(_, s, state):
        m, l = state
        m_new = jnp.maximum(m, s.max(1) * LOG2E)
        p = jnp.exp2(s * LOG2E - lax.broadcast_in_dim(m_new, s.shape, (0,)))
        return m_new, l * jnp.exp2(m - m_new) + p.sum(1)

    empty = warpgroup.full((VOTERS,), START, ROWS), warpgroup.full((VOTERS,), 0.0, ROWS)
    m, l = loop(more, empty)
    seen = l > 0
    lse = m / LOG2E + jnp.log(jnp.where(seen, l, 1))
    lse_ref[n, number] = jnp.where(seen, lse, -jnp.inf)


def _sums(*refs, p_smem, warpgroup: Warpgroup, **rest):
    """Weights of one page by column and by diagonal, and by diagonal past its end.

    Args:
        refs: the last four are the log-sum-exp of each row over all keys, in base 2 and infinite
            in rows without a vote, and the results.
        p_smem: weights of a tile, after the last ones of the tile before.
    """
    *given, lse_ref, columns_ref, diagonals_ref, over_ref = refs
    n, number, count, loop = _stream(*given, warpgroup=warpgroup, **rest)

    def added(first_of):
        rows = [p_smem.at[r, pl.ds(first_of(r), TILE)] for r in range(VOTERS)]
        return functools.reduce(jnp.add, [warpgroup.vector(row, THREADS) for row in rows])

    def diagonal():
        return added(lambda r: VOTERS - r)

    def more(j, s, state):
        lse = lax.broadcast_in_dim(warpgroup.vector(lse_ref.at[n], ROWS), s.shape, (0,))
        p = jnp.exp2(s * LOG2E - lse)
        p_smem[:, VOTERS : VOTERS + TILE] = p
        columns_ref[n, number, j] = added(lambda _: VOTERS)
        diagonals_ref[n, number, j] = diagonal()
        p_smem[:, :VOTERS] = p[:, TILE - VOTERS :]
        return state

    p_smem[:, :VOTERS] = warpgroup.full((VOTERS, VOTERS), 0.0)
    loop(more, ())
    p_smem[:, VOTERS : VOTERS + TILE] = warpgroup.full((VOTERS, TILE), 0.0)
    over_ref[n, number] = diagonal()

    @pl.loop(count, columns_ref.shape[2])
    def _without_keys(j):
        nothing = warpgroup.full((TILE,), 0.0, THREADS)
        columns_ref[n, number, j] = nothing
        diagonals_ref[n, number, j] = nothing
