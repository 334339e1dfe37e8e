"""Sizes and random inputs of scripts/bench_gpu.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import plan
from pallas_kernels.cases import Case, Served
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from qwen_jax.planner.shapes import MODELS, Model

SETS = 3  # of inputs that calls take turns through
RUN = 64  # neighbours of about the same weight, as in scripts/density.py


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes that are timed.

    Attributes:
        page: tokens per page.
        tiles: tile sizes of plans.
        checks: names of cases that are compared first, in all rows.
        medium: case that is compared in some rows, or None.
        matrix: rows and columns of the matrix product.
        copied: bytes of the copy.
        prompts: tokens of prompts that are prefilled at once; the target is for `prompt`.
        context: tokens of the context, of which the last `slice_len` are the slice.
        sparse: tokens of prompts that are prefilled at once by plans.
        share: fraction of the blocks that these plans keep.
        vertical: mean column budget of a head; `slash` is its mean diagonal budget.
        decode: tokens and number of the sequences, and layers of their cache.
        groups: number of groups of calls, each of which takes `group_seconds`.
    """

    model: Model
    dtype: str
    page: int
    tiles: Tiles
    checks: tuple[str, ...]
    medium: Served | None
    matrix: int
    copied: int
    prompts: tuple[int, ...]
    prompt: int
    context: int
    slice_len: int
    sparse: tuple[int, ...]
    share: float
    vertical: int
    slash: int
    decode: tuple[tuple[int, int, int], ...]
    groups: int
    group_seconds: float

    def case(
        self, context: int, slice_len: int, *, chunks: bool, layers: int = SETS, seqs: int = 1
    ):
        """Returns a shape of the model, with or without Dual Chunk Attention."""
        return served(
            self.model,
            context=context,
            slice_len=slice_len,
            page=self.page,
            geometry=self.model.geometry if chunks else None,
            num_layers=layers,
            num_seqs=seqs,
            num_columns=min(self.model.num_columns, context),
        )


def served(shape: Case | Model, *, context: int, page: int, num_seqs: int, **more) -> Served:
    """Returns a shape with pages for all tokens of all sequences, and an unused one."""
    return Served(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        context=context,
        page=page,
        num_seqs=num_seqs,
        num_pages=num_seqs * -(-context // page) + 1,
        **more,
    )


REAL = Sizes(
    model=MODELS["7B"],
    dtype="bfloat16",
    page=1024,
    tiles=Tiles(q=128, k=64),  # as qwen_jax has them on a GPU
    checks=("one window", "tiles fit the chunk", "small at 2k"),
    # Borders at 7,000 and 10,500, the last one inside the slice, neither at one of tiles.
    medium=dataclasses.replace(
        MODELS["7B"].served(11_000, num_layers=2, slice_len=1024),
        geometry=ChunkGeometry(chunk_size=4_000, local_size=500),
    ),
    matrix=8192,
    copied=2**32,
    prompts=(8_192, 16_384, 32_768, 131_072),
    prompt=16_384,
    context=1_010_000,
    slice_len=32_768,
    sparse=(65_536, 131_072),
    share=0.1,
    # Means of the 784 heads of the 7B model's sparse_attention_config.json, 30 columns read as 130.
    vertical=3_929,
    slash=7_650,
    decode=((131_072, 1, 8), (131_072, 8, 8), (1_010_000, 1, 8), (1_010_000, 8, 2)),
    groups=5,
    group_seconds=0.3,
)
TINY = dataclasses.replace(
    REAL,
    model=dataclasses.replace(
        MODELS["7B"],
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_columns=40,
        geometry=ChunkGeometry(chunk_size=64, local_size=16),
    ),
    page=16,
    tiles=Tiles(q=16, k=8),
    checks=("tiles fit the chunk",),
    medium=None,
    matrix=64,
    copied=2**12,
    prompts=(64,),
    prompt=64,
    context=200,
    slice_len=32,
    sparse=(96,),
    share=0.5,
    vertical=34,
    slash=104,
    decode=((200, 2, 2),),
    groups=2,
    group_seconds=0,
)


class Draw:
    """Generator of random inputs, different in each call."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def key(self):
        return jax.random.key(int(self.rng.integers(2**31)), impl="rbg")  # soon compiled and run

    def normal(self, dtype: str, *shape: int):
        return normal(self.key(), shape, dtype)

    def queries(self, case: Case, dtype: str, *shape: int):
        """Draws queries [views, *shape, N, H], multiplied by the softmax scale."""
        views = 1 if case.geometry is None else 3
        x = self.normal(dtype, views, *shape, case.num_heads, case.head_dim)
        return x * jnp.asarray(case.head_dim**-0.5, dtype)

    def paged(self, case: Served, dtype: str, *sequences: int):
        """Draws a cache, and page tables [P] or, of B sequences, [B, P] in random order."""
        shape = (*sequences, -(-case.context // case.page))
        pages = self.rng.permutation(case.num_pages)[: np.prod(shape)]
        tables = jnp.asarray(pages.reshape(shape), jnp.int32)
        keys, values = (cache(self.key(), tables, case, dtype) for _ in range(2))
        return PagedKV(keys, values), tables

    def slices(
        self, case: Served, dtype: str, *, sets: int = SETS, padding: int = 0
    ) -> list[tuple]:
        """Draws sets of arguments of prefill: the end of the context, then rows of padding."""
        kv, table = self.paged(case, dtype)
        length = case.slice_len - padding
        at = table, jnp.int32(case.context - length), jnp.int32(length)
        return [
            (
                self.queries(case, dtype, case.slice_len),
                kv,
                jnp.int32(i % case.num_layers),
                *at,
            )
            for i in range(sets)
        ]

    def plan(self, case: Served, start: int, length: int, tiles: Tiles, share: float):
        """Draws a plan in which a tile reads its own blocks and earlier ones, to a `share` of all.

        Each head also reads `num_columns` random columns, fewer if there are fewer keys.
        """
        N, T, end = case.num_heads, case.slice_len, start + length
        words = -(-(-(-case.context // case.page) * case.page) // (32 * tiles.k))
        reads = np.zeros((N, -(-T // tiles.q), 32 * words), bool)
        for i in range(-(-length // tiles.q)):
            first = start + i * tiles.q
            before, count = first // tiles.k, (min(first + tiles.q, end) - 1) // tiles.k + 1
            reads[:, i, before:count] = True
            others = min(max(round(share * count) - (count - before), 0), before)
            if others:
                chosen = self.rng.random((N, before)).argpartition(others - 1, -1)[:, :others]
                np.put_along_axis(reads[:, i], chosen, True, -1)
        columns = np.full((N, max(case.num_columns, 1)), plan.ABSENT, np.int32)
        count = min(case.num_columns, end)
        for row in columns:
            row[:count] = np.sort(self.rng.choice(end, count, replace=False))
        packed = np.packbits(reads, -1, bitorder="little").view("<u4")
        return plan.SparsePlan(jnp.asarray(packed), jnp.asarray(columns), tiles)

    def clustered(self, shape: tuple[int, int], end: int):
        """Draws votes of heads for positions, which fall with the distance; runs share a weight."""

        @jax.jit
        def make(key):
            place = end - 1 - jnp.arange(shape[1], dtype=jnp.int32)
            run = place.clip(0) // RUN
            noise = jax.random.exponential(key, (shape[0], end // RUN + 1))[:, run]
            weight = 1 / (1 + run.astype(jnp.float32)) + 0.1 * noise
            return jnp.where(place >= 0, weight, 0.0)

        return make(self.key())


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key, shape: tuple[int, ...], dtype: str):
    return jax.random.normal(key, shape, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("case", "dtype"))
def cache(key, tables, case: Served, dtype: str):
    """Draws keys or values of all layers; rows that hold no token of a sequence are NaN."""
    P, page = tables.shape[-1], case.page
    used = (jnp.arange(P * page, dtype=jnp.int32) < case.context).reshape(P, page)
    used = jnp.broadcast_to(used, (*tables.shape, page))
    written = jnp.zeros((case.num_pages, page), bool).at[tables].set(used)

    def of_head(key):  # one at a time: random bits take more room than what they become
        x = jax.random.normal(key, (*written.shape, case.head_dim), jnp.dtype(dtype))
        return jnp.where(written[..., None], x, jnp.asarray(jnp.nan, dtype))

    x = jax.lax.map(of_head, jax.random.split(key, case.num_layers * case.num_kv_heads))
    return x.reshape(case.num_layers, case.num_kv_heads, *x.shape[1:])
