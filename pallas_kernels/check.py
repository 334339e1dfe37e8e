"""Check: comparison of a backend with a reference on this device, at the shapes of a model.

A kernel that compiles may still compute wrong numbers on a device on which it was never run; this
finds out. It takes seconds and a small cache: pages are repeated along a context.

Each program is compared twice. A short context of two pages, with chunk borders inside tiles,
is compared with `reference`; a long one, with the model's own chunks, with `xla`. Either truth is
computed in float32 with exact products, one KV head at a time, on the same values.

Keys near the borders of chunks and pages, at the beginning and at the end have the largest
weights, so that a single pair in the wrong view or behind the wrong mask changes an output by
several percent. What must not be read is NaN: rows past the end, other pages and the other layer
of the cache.

    for result in check(Shape(num_heads=28, num_kv_heads=4, head_dim=128, page=1024, ...)):
        print(result)
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.tiles import Tiles, of_page, tables
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from pallas_kernels.plan import ABSENT, SparsePlan
from pallas_kernels.programs import PLAN, PROGRAMS, VOTERS
from pallas_kernels.shard import Shard

LIMIT = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest error of a row relative to its norm, and of a log-sum-exp as it is.

The tests of the kernels allow 2e-6 and 2e-2 of the largest magnitude, twice what was measured
(tests/support/tolerances.py, tests/kernels/test_mosaic_tpu_prefill.py). On the inputs below the
kernels are wrong by up to 9e-7 and 9.6e-3 in their interpreters
(tests/kernels/test_check_interpreted.py).
In float32 there is more room, for sums in another order, but none for products of numbers of 16 or
19 bits, which are wrong by 3e-4 and more. The mistakes of tests/kernels/test_check.py are wrong by
4e-2 or more.
"""
LAYER = 1
NEAR = 4
"""Number of tokens around a border whose keys have the largest weights."""
QUIET, FILLING = -2.0, -8.0
"""Biases of the logits of other keys, and of pages that are repeated far from any border."""
FILLERS = 3
ROWS, SHORT_ROWS = 320, 40
"""Queries of a slice, at least two tiles of every kernel; and queries of the short context."""
COLUMNS = 300
"""Most columns that a head reads by a plan; not a multiple of a register's lanes."""
PAGES = 12
"""Pages of a context up to which every page has different keys; longer ones repeat pages."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Attention shape of one device: heads, pages, chunks, dtype.

    Attributes:
        num_heads: number of query heads.
        page: tokens per page, of which each of `parts` devices holds an equal part.
        dtype: dtype of queries, keys and values.
        geometry: chunk sizes of Dual Chunk Attention, or None without it.
        plan: tile sizes of sparse prefill.
        far: compare at the borders of the model's chunks, however long, not of smaller ones; takes
            the time of a few slices at such a position, for `xla` too.
        rows: queries per slice.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page: int
    dtype: str
    geometry: ChunkGeometry | None
    parts: int = 1
    plan: Tiles = PLAN
    far: bool = True
    rows: int = ROWS

    def soon(self) -> "Shape":
        """Return a shape with smaller pages, chunks and slices but equal heads, for a CPU."""
        page = min(self.page, 128 * self.parts)
        rows = min(self.rows, 96)
        return dataclasses.replace(self, page=page, rows=rows, far=False)


Verdict = Literal["agrees", "differs", "fails", "refuses"]
"""Verdict on a backend: `refuses` if it raises `Unsupported`, `fails` if any other error."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Comparison of one program of a backend with the truth.

    Attributes:
        program: one of `PROGRAMS`.
        context: tokens of the sequence.
        truth: backend that it was compared with.
        error: largest error of a row, relative to its norm; None if it is not finite or unknown.
        lse_error: largest error of a log-sum-exp; None also for selection, which has none.
        limit: tolerance of both errors.
        reason: reason why it does not agree, in one line; "" if it does.
    """

    program: str
    backend: str
    context: int
    truth: str
    verdict: Verdict
    error: float | None
    lse_error: float | None
    limit: float
    reason: str = ""

    def __str__(self) -> str:
        what = f"{self.program} by {self.backend}, {self.context:,} tokens"
        return f"{what}: {self.verdict}{f', {self.reason}' if self.reason else ''}"


class Place(NamedTuple):
    """Context length at which a shape is compared.

    Attributes:
        borders: positions around which keys have the largest weights.
        rows: queries per slice.
    """

    context: int
    geometry: ChunkGeometry | None
    borders: tuple[int, ...]
    rows: int
    truth: str


def check(
    shape: Shape,
    choice: backend.Choice = None,
    *,
    programs: tuple[str, ...] = tuple(PROGRAMS),
    device: Any = None,
) -> Iterator[Result]:
    """Compare the chosen backends with the truth; yields one result per program and context.

    Args:
        device: a JAX device; None for the first one of this process.

    Raises:
        Unsupported: if a backend does not run there.
    """
    device = device or jax.local_devices()[0]
    chosen = backend.choose(
        device.platform,
        choice,
        kind=device.device_kind,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
    )
    for place in places(shape):
        for name in programs:
            who = getattr(chosen, PROGRAMS[name])
            truth = "reference" if who == "xla" and not shape.far else place.truth
            yield _compared(name, shape, place._replace(truth=truth), who, device)


def places(shape: Shape) -> tuple[Place, Place]:
    """Return the short and the long context at which a shape is compared."""
    page, given = shape.page, shape.geometry

    def chunks(length: int) -> ChunkGeometry:
        local = max(length // 4, 1)
        return ChunkGeometry(length + local, local)

    short = None if given is None else chunks(page // 2 + 3)
    long = given
    if given is not None and not shape.far and given.chunk_len > 3 * page:
        long = chunks(2 * page + page // 2 + 3)

    def place(geometry, borders, context: int, rows: int, truth: str) -> Place:
        inside = sorted({0, *(each for each in borders if each < context), context})
        return Place(context, geometry, tuple(inside), min(rows, context), truth)

    c = page // 2 + 3 if short is None else short.chunk_len
    first = place(short, (c, page, 2 * c), 2 * page - page // 4, SHORT_ROWS, "reference")
    c = 2 * page if long is None else long.chunk_len
    end = max(2 * c + 3 * page // 2, 13 * page // 2) + 5
    return first, place(long, (page, c, 2 * c), end, shape.rows, "xla")


class Inputs(NamedTuple):
    """Arguments of an operation, as NumPy or JAX arrays.

    Attributes:
        queries: array [views, ..., N, H].
        cache: cache with arrays [2, K, pages, part, H].
        rest: arguments after the cache, from the layer on.
        plan: plan of sparse prefill; None for other programs.
    """

    queries: Any
    cache: Any
    rest: tuple[Any, ...]
    plan: SparsePlan | None
    shard: Shard


class Errors(NamedTuple):
    """Largest errors of a result: of a row, relative to its norm, and of a log-sum-exp.

    `lse` is None for a program without it. An error is NaN or infinite if a result is NaN or
    infinite where the truth is not, or the reverse.
    """

    row: float
    lse: float | None

    def within(self, limit: float) -> bool:
        return self.row <= limit and (self.lse is None or self.lse <= limit)

    def and_(self, other: "Errors") -> "Errors":
        """Return the elementwise maximum; NaN wins."""
        lse = None if self.lse is None or other.lse is None else np.maximum(self.lse, other.lse)
        return Errors(float(np.maximum(self.row, other.row)), None if lse is None else float(lse))

    def __str__(self) -> str:
        said = f"a row is wrong by {self.row:.2g} of its norm"
        return said if self.lse is None else f"{said}, a log-sum-exp by {self.lse:.2g}"


def _compared(name: str, shape: Shape, place: Place, who: str, device: Any) -> Result:
    """Run a program on all inputs of a place; keep the largest errors or the first failure."""
    limit = LIMIT[shape.dtype]
    worst = Errors(0.0, None if name == "selection" else 0.0)
    verdict, reason = "agrees", ""
    run = compiled(name, who, place.geometry, device.platform)
    for said, length, args in inputs(name, shape, place):
        try:
            args = jax.device_put(args, device)
            found = jax.device_get(run(args))
            expected = _truth(name, place, args)
        except backend.Unsupported as error:
            verdict, reason = "refuses", str(error)
            break
        except Exception as error:  # whatever a compiler or a driver raises is a verdict
            verdict, reason = "fails", _in_a_line(error)
            break
        errors = _errors(name, found, expected, length)
        worst = worst.and_(errors)
        if not errors.within(limit):
            verdict, reason = "differs", f"{errors} {said}, where {limit:g} is allowed"
            break
    known = verdict in ("agrees", "differs")
    return Result(
        program=name,
        backend=who,
        context=place.context,
        truth=place.truth,
        verdict=verdict,
        error=_finite(worst.row) if known else None,
        lse_error=_finite(worst.lse) if known else None,
        limit=limit,
        reason=reason,
    )


def _in_a_line(error: Exception) -> str:
    """Summarise an error: type, first line and last line, without the stack between."""
    lines = [line for line in map(str.split, str(error).splitlines()) if line]
    said = [" ".join(line)[:300] for line in (lines[:1] + lines[1:][-1:])]
    return ": ".join([type(error).__name__, *said])


def _finite(figure: float | None) -> float | None:
    return figure if figure is not None and np.isfinite(figure) else None


def compiled(
    name: str, who: str, geometry: ChunkGeometry | None, platform: str
) -> Callable[[Inputs], tuple[Array, Array]]:
    """Return a jitted function of `Inputs`, compiled as an engine compiles it."""

    def run(args: Inputs):
        return _call(name, who, geometry, args)

    return jax.jit(run, compiler_options=backend.compiler_options(platform))


def _call(name: str, who: str, geometry: ChunkGeometry | None, args: Inputs):
    more = {} if args.plan is None else {"plan": args.plan}
    given = args.queries, args.cache, *args.rest
    return backend.call(PROGRAMS[name], who, *given, geometry=geometry, shard=args.shard, **more)


def _truth(name: str, place: Place, args: Inputs) -> list[np.ndarray]:
    """Compute the expected result in float32, one KV head at a time to save memory."""
    run = exact(name, place.truth, place.geometry)
    heads = [jax.device_get(run(args, np.int32(head))) for head in range(args.cache.keys.shape[1])]
    axes = (0, 0) if name == "selection" else (-2, -1)
    parts = zip(*heads, strict=True)
    return [np.concatenate(part, axis) for part, axis in zip(parts, axes, strict=True)]


@functools.cache
def exact(name: str, who: str, geometry: ChunkGeometry | None) -> Callable:
    """Return a program of one kv head in float32 with exact products."""

    def run(args: Inputs, head):
        kv_heads, num_heads = args.cache.keys.shape[1], args.queries.shape[-2]
        group = num_heads // kv_heads

        def own(x, axis: int):
            return jax.lax.dynamic_slice_in_dim(x, head * group, group, axis)

        queries = own(args.queries, args.queries.ndim - 2).astype("float32")

        def own_head(array):
            return jax.lax.dynamic_slice_in_dim(array, head, 1, 1).astype("float32")

        cache = jax.tree.map(own_head, args.cache)
        plan = args.plan
        if plan is not None:
            plan = dataclasses.replace(
                plan, blocks=own(plan.blocks, 0), columns=own(plan.columns, 0)
            )
        alone = args._replace(queries=queries, cache=cache, plan=plan)
        with jax.default_matmul_precision("highest"):
            return _call(name, who, geometry, alone)

    return jax.jit(run)


def _errors(name: str, found, truth, length: int) -> Errors:
    """Compute the largest errors over the valid rows.

    Args:
        length: valid queries of the slice; rows after them are padding, which must be finite.
    """
    if name == "selection":
        return Errors(float(np.max([*map(_row_error, found, truth)])), None)
    (out, lse), (right, right_lse) = found, truth
    if name != "decode":
        if not np.isfinite(out[length:].astype(np.float32)).all():
            return Errors(np.nan, 0.0)
        out, lse, right, right_lse = (x[:length] for x in (out, lse, right, right_lse))
    with np.errstate(invalid="ignore"):
        apart = np.where(lse == right_lse, 0.0, np.abs(lse.astype(np.float64) - right_lse))
    return Errors(_row_error(out, right), float(apart.max()))


def _row_error(found: np.ndarray, truth: np.ndarray) -> float:
    """Compute the largest error of a row relative to its norm; infinite if a zero row differs."""
    norm = np.linalg.norm(truth, axis=-1)
    error = np.linalg.norm(found.astype(np.float32) - truth, axis=-1)
    empty = np.where(error == 0, 0.0, np.inf)
    return float(np.where(norm > 0, error / np.where(norm > 0, norm, 1.0), empty).max())


def inputs(name: str, shape: Shape, place: Place) -> Iterator[tuple[str, int, Inputs]]:
    """Yield inputs of a program: a description, the number of valid queries, and the arrays."""
    draw = _Draw(name, shape, place)
    if name == "decode":
        after = {each - back for each in place.borders for back in (0, 1)}
        positions = sorted(each for each in after if 0 <= each < place.context)
        yield (
            f"in sequences of up to {place.context:,} tokens",
            len(positions),
            draw.sequences(positions),
        )
        return
    rows = draw.rows
    spans = [(0, rows), (place.context - 3, 3)]
    spans += [(max(each - rows // 2, 0), rows - 5) for each in place.borders[1:-1]]
    for start, most in spans:
        length = max(min(most, place.context - start), 1)
        yield f"in {length} queries from {start:,} on", length, draw.slice(name, start, length)


class _Draw:
    """Random inputs at a place: one cache, and slices or sequences that read it.

    Attributes:
        rows: queries of a slice.
    """

    def __init__(self, name: str, shape: Shape, place: Place):
        self._rng = np.random.default_rng(0)
        self._shape, self._place = shape, place
        self.rows = place.rows
        if name == "sparse prefill" and place.rows > SHORT_ROWS:  # more than a tile
            self.rows = min(max(place.rows, shape.plan.q + shape.plan.q // 8), place.context)
        # Shards vote together, which takes all of them: there the part of one is the whole page.
        parts = 1 if name == "selection" else shape.parts
        self._part = shape.page // shape.parts
        self._page = self._part * parts
        self._shard = Shard(parts - 1, self._part, parts)
        count = -(-place.context // self._page)
        near = {
            page
            for each in place.borders
            for page in range(
                max(each - self.rows, 0) // self._page, (each + self.rows) // self._page + 1
            )
        }
        self._real = np.array([page for page in range(count) if count <= PAGES or page in near])
        # Nobody reads page 0. Of every other sequence the first page is another one, so that
        # their keys differ.
        places = self._rng.permutation(np.arange(1, len(self._real) + FILLERS + 2))
        places = places.astype(np.int32)
        self._first, pages = places[FILLERS], places[FILLERS + 1 :]
        self._table = places[np.arange(count) % FILLERS]
        self._table[self._real] = pages
        bias = np.full((len(places) + 1, self._part), FILLING, np.float32)
        bias[pages] = self._bias(self._positions(self._real))
        bias[self._first] = bias[self._table[0]]
        size = 2, shape.num_kv_heads, *bias.shape, shape.head_dim
        keys, values = self._rng.standard_normal(size, np.float32)
        keys[..., 0] = bias
        self._cache = np.full((2, *size), np.nan, shape.dtype)
        self._cache[:, LAYER] = keys, values
        self._cache[..., 0, :, :] = np.nan

    def slice(self, name: str, start: int, length: int) -> Inputs:
        """Return inputs of a slice at the end of one sequence."""
        voters = min(self.rows, VOTERS) if name == "selection" else self.rows
        queries = self._queries(voters)
        if name == "selection":
            queries[:, : max(voters - length, 0)] = 1e3  # rows before the slice
        else:
            queries[:, length:] = 1e3  # padding
        cache, table = self._until(start + length)
        return Inputs(
            queries,
            cache,
            (np.int32(LAYER), table, np.int32(start), np.int32(length)),
            self._plan(start, length) if name == "sparse prefill" else None,
            self._on_device(),
        )

    def sequences(self, positions: list[int]) -> Inputs:
        """Return inputs of sequences with their last token at these positions, and an idle row."""
        cache, table = self._until(self._place.context)
        tables = np.zeros((len(positions) + 1, len(table)), np.int32)
        idle = len(tables) // 2
        at = np.insert(np.array(positions, np.int32), idle, -1)
        for i, position in enumerate(at):
            own = np.arange(len(table)) * self._page <= position
            tables[i] = np.where(own, table, 0)
            if i % 2 and position >= 0:
                tables[i, 0] = self._first
        rest = np.int32(LAYER), tables, at[:, None]
        return Inputs(self._queries(len(at), 1), cache, rest, None, self._on_device())

    def _on_device(self) -> Shard:
        """Shard whose index is an array: unknown when a program is compiled."""
        return dataclasses.replace(self._shard, index=jnp.int32(self._shard.index))

    def _queries(self, *size: int) -> np.ndarray:
        """Random scaled queries; the first number of each is 1 and takes the keys' bias."""
        views, H = 1 if self._place.geometry is None else 3, self._shape.head_dim
        drawn = self._rng.standard_normal((views, *size, self._shape.num_heads, H), np.float32)
        drawn *= H**-0.5
        drawn[..., 0] = 1
        return drawn.astype(self._shape.dtype)

    def _positions(self, pages: np.ndarray) -> np.ndarray:
        """Positions [pages, part] of the local keys of some pages of the sequence."""
        first = pages[:, None] * self._page + int(self._shard.index) * self._part
        return first + np.arange(self._part)

    def _bias(self, positions: np.ndarray) -> np.ndarray:
        away = np.abs(positions[..., None] - np.array(self._place.borders)).min(-1)
        return np.where(away <= NEAR, 0, QUIET)

    def _until(self, end: int) -> tuple[PagedKV, np.ndarray]:
        """Cache and page table of a sequence of `end` tokens; rows after them are NaN."""
        last = (end - 1) // self._page
        cache = self._cache.copy()
        after = self._positions(np.array([last]))[0] >= end
        cache[:, :, :, self._table[last], after] = np.nan
        table = np.where(np.arange(len(self._table)) <= last, self._table, 0)
        return PagedKV(*map(jnp.asarray, cache)), table

    def _plan(self, start: int, length: int) -> SparsePlan:
        """Random blocks and columns; the first head has columns alone, the last of many nothing."""
        shape, shard = self._shape, self._shard
        k, q = of_page(self._part, shape.plan.k), min(self.rows, shape.plan.q)
        page = np.arange(len(self._table) * self._part // k) * k // self._part
        first = shard.position(np.arange(len(page)) * k)
        tile = np.arange(-(-self.rows // q))
        final = np.minimum(start + (tile + 1) * q, start + length) - 1
        share = np.where(np.isin(page, self._real), 0.5, 0.05)
        reads = self._rng.random((shape.num_heads, len(tile), len(first))) < share
        reads &= (first <= final[:, None]) & (tile * q < length)[:, None]
        reads[0] = False
        keys = (self._real[:, None] * self._part + np.arange(self._part)).reshape(-1)
        keys = keys[keys < shard.before(np.int64(start + length))]
        columns = np.full((shape.num_heads, COLUMNS), ABSENT, np.int32)
        count = min(COLUMNS - 7, len(keys) // 2)
        for head in columns:
            head[:count] = np.sort(self._rng.choice(keys, count, replace=False))
        if shape.num_heads > 2:
            reads[-1], columns[-1] = False, ABSENT
        reads = np.pad(reads, ((0, 0), (0, 0), (0, -len(page) % 32)))
        packed = np.packbits(reads, -1, bitorder="little").view("<u4")
        return SparsePlan(jnp.asarray(packed), jnp.asarray(columns), Tiles(q, k))


def source() -> str:
    """Hash every source file of this package and the tables of tile sizes (SHA-256, hex)."""
    digest = hashlib.sha256()
    for folder in sorted({Path(__file__).parent, tables()}):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".json") and path.is_file():
                content = path.read_bytes()
                digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()
