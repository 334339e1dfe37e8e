"""A cache cut into shards: results of all of them, merged, against float64.

One process stands in for all devices. Attention runs once for each shard; the vote, in which
shards talk to each other, runs for all of them in `vmap`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import ABSENT, SparsePlan
from pallas_kernels.shard import Shard
from support import oracle, sparse_oracle
from support.sequences import after
from support.tolerances import LIMIT, assert_close

LAYER, NOWHERE = 1, 2**30
PART, PAGES, COUNT = 32, 12, 3
PAGE = PART * COUNT
S = PAGES * PAGE  # so that each shard has three steps of 128 keys
K, N, T = 1, 2, 40
GEOMETRIES = {
    "one window": None,
    "borders in and between parts": ChunkGeometry(chunk_size=420, local_size=84),
    "chunks of two parts and a half": ChunkGeometry(chunk_size=100, local_size=20),
    "chunks smaller than a part": ChunkGeometry(chunk_size=30, local_size=19),
}
# One key; a border of parts; a border of chunks; the end, to which whole steps lie in one view.
SLICES = (0, 1), (PART - 2, 3), (1000, T), (S - T - 9, T)
BLOCK, Q_TILE, COLUMNS = 16, 24, 256


def merged(results):
    """Merges every shard's output and log-sum-exp; a shard without keys must have output 0."""
    outs, lses = (
        np.stack([np.asarray(x, np.float64) for x in xs]) for xs in zip(*results, strict=True)
    )
    assert (outs[np.isneginf(lses)] == 0).all()
    assert not np.isnan(lses).any()
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(lses).sum(0))
        weights = np.exp(lses - np.where(np.isneginf(lse), 0, lse))
    return (weights[..., None] * outs).sum(0).astype(np.float32), lse.astype(np.float32)


def random_plan(start, length):
    """A plan for each shard, and the mask of the whole that they make."""
    rng, end = np.random.default_rng(start), start + length
    tile = np.arange(-(-T // Q_TILE))
    last = np.minimum((tile + 1) * Q_TILE, length) - 1 + start
    reads = rng.random((N, len(tile), S // BLOCK)) < 0.5
    reads &= np.arange(S // BLOCK) * BLOCK <= last[:, None]
    reads &= (tile * Q_TILE < length)[:, None]
    columns = rng.random((N, S)) < 0.4
    columns[:, end:] = False
    mask = (reads.repeat(BLOCK, 2) | columns[:, None]).repeat(Q_TILE, 1)[:, :T]

    def of_shard(index):
        def own(x, unit):
            parts = x.reshape(*x.shape[:-1], PAGES, COUNT, PART // unit)
            return parts[..., index, :].reshape(*x.shape[:-1], -1)

        bits = own(reads, BLOCK)
        bits = np.pad(bits, ((0, 0), (0, 0), (0, -bits.shape[2] % 32)))
        listed = np.full((N, COLUMNS), ABSENT, np.int32)
        for row, chosen in zip(listed, map(np.flatnonzero, own(columns, 1)), strict=True):
            row[: len(chosen)] = chosen
        blocks = np.packbits(bits, axis=2, bitorder="little").view(np.uint32)
        return SparsePlan(jnp.asarray(blocks), jnp.asarray(listed), Tiles(Q_TILE, BLOCK))

    return [of_shard(i) for i in range(COUNT)], mask


@dataclasses.dataclass(frozen=True)
class Cut:
    """Random sequences in a cache of heads of this size and type, cut into `COUNT` shards."""

    head_dim: int = 16
    dtype: str = "float32"

    def paged(self, tables, flats):
        """Sequences [n, K, H] in a cache that holds nan everywhere else."""
        shape = 2, K, tables.size + 1, PAGE, self.head_dim
        cache = np.full(shape, np.nan, jnp.dtype(self.dtype))
        for table, flat in zip(tables, flats, strict=True):
            for s in range(len(flat)):
                cache[LAYER, :, table[s // PAGE], s % PAGE] = flat[s]
        return cache

    def shard(self, caches, index):
        rows = slice(index * PART, (index + 1) * PART)
        return PagedKV(*(jnp.asarray(cache[:, :, :, rows]) for cache in caches))

    def random(self, rng, *shape):
        return rng.standard_normal((*shape, self.head_dim)).astype(jnp.dtype(self.dtype))

    def prefill(self, attend, geometry, slices, plan=None):
        """Compare slices, dense or by a plan for each shard, as `random_plan` makes them.

        Args:
            attend: called as `prefill.prefill`.
        """
        rng = np.random.default_rng(0)
        table = rng.permutation(np.arange(1, PAGES + 1)).astype(np.int32)
        flat = self.random(rng, 2, S, K)
        views = 1 if geometry is None else 3
        queries = jnp.asarray(self.random(rng, views, T, N))

        @jax.jit
        def run(kv, start, length, index, plan):
            return attend(
                *(queries, kv, jnp.int32(LAYER), jnp.asarray(table), start, length),
                geometry=geometry,
                plan=plan,
                shard=Shard(index, PART, COUNT),
            )

        for start, length in slices:
            caches = [self.paged(table[None], [x[: start + length]]) for x in flat]
            plans, mask = plan(start, length) if plan else ([None] * COUNT, None)
            numbers = jnp.int32(start), jnp.int32(length)
            out, lse = merged(
                run(self.shard(caches, i), *numbers, jnp.int32(i), plans[i]) for i in range(COUNT)
            )
            given = queries, *flat, start, length, geometry, mask
            expected, expected_lse = (x[:length] for x in oracle.attention(*given))
            out, lse = out[:length], lse[:length]
            seen = np.isfinite(expected_lse)
            assert (np.isfinite(lse) == seen).all()
            assert (out[~seen] == 0).all()
            if seen.any():
                assert_close(out, expected, LIMIT[self.dtype])
                assert_close(lse[seen], expected_lse[seen])

    def decode(self, attend, geometry):
        """Compare a batch; `attend` is called as `decode.decode`."""
        rng = np.random.default_rng(2)
        rows = [after(0), [], after(PART - 2, 4), after(PAGE - 1), [], after(990), after(1006, 3)]
        rows.append(after(S - 34, 2))
        B, Q = len(rows), max(map(len, rows))
        positions = np.array([[*row, *[-1] * (Q - len(row))] for row in rows], np.int32)
        lens = positions.max(1) + 1
        tables = rng.permutation(np.arange(1, B * PAGES + 1)).reshape(B, PAGES).astype(np.int32)
        flats = [self.random(rng, 2, n, K) for n in lens]
        caches = [self.paged(tables, [flat[i] for flat in flats]) for i in range(2)]
        # To read a page that is not there is an error.
        tables[np.arange(PAGES) >= -(-lens[:, None] // PAGE)] = NOWHERE
        views = 1 if geometry is None else 3
        queries = jnp.asarray(self.random(rng, views, B, Q, N))

        @jax.jit
        def run(kv, index):
            return attend(
                *(queries, kv, jnp.int32(LAYER), jnp.asarray(tables), jnp.asarray(positions)),
                geometry=geometry,
                shard=Shard(index, PART, COUNT),
            )

        out, lse = merged(run(self.shard(caches, i), jnp.int32(i)) for i in range(COUNT))
        assert (out[positions < 0] == 0).all()
        assert np.isneginf(lse[positions < 0]).all()
        for b, row in enumerate(rows):
            if row:
                given = queries[:, b], *flats[b], row[0], len(row), geometry
                for found, wanted in zip((out, lse), oracle.attention(*given), strict=True):
                    assert_close(found[b, : len(row)], wanted[: len(row)])

    def vote(self, cast, geometry, *, part, slices, R=20):
        """Compare votes over two pages of parts of this size; `cast` is called as `select.vote`."""
        pages, page = 2, part * COUNT
        rng = np.random.default_rng(3)
        views = 1 if geometry is None else 3
        queries = rng.standard_normal((views, R, N, self.head_dim)) * 6 / self.head_dim
        queries = jnp.asarray(queries, self.dtype)
        table = np.array([2, 1], np.int32)

        @jax.jit
        def run(keys, start, length):
            def local(index, keys):
                shard = Shard(index, part, COUNT, "shards")
                where = jnp.int32(LAYER), jnp.asarray(table), start, length
                return cast(queries, PagedKV(keys, keys), *where, geometry=geometry, shard=shard)

            return jax.vmap(local, axis_name="shards")(jnp.arange(COUNT, dtype=jnp.int32), keys)

        for start, length in slices:
            end = start + length
            flat = self.random(rng, pages * page, K)
            flat[end:] = np.nan
            cache = np.full((2, K, pages + 1, page, self.head_dim), np.nan, flat.dtype)
            for number in range(pages):
                rows = flat[number * page : (number + 1) * page]
                cache[LAYER, :, table[number]] = rows.swapaxes(0, 1)
            cuts = np.stack(np.split(cache, COUNT, axis=3))
            sums = run(jnp.asarray(cuts), jnp.int32(start), jnp.int32(length))
            expected = sparse_oracle.votes(queries, flat, start, length, geometry)
            for found, wanted in zip(sums, expected, strict=True):
                found = np.asarray(found).reshape(COUNT, N, pages, part)
                found = found.transpose(1, 2, 0, 3).reshape(N, -1)
                assert_close(found[:, :end], wanted)
                assert (found[:, end:] == 0).all()
