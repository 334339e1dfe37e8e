"""Configuration of an engine, and the layout that follows from it: pages, slices, tables."""

import dataclasses

from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import ConfigError, ModelConfig, SparseConfig
from qwen_jax.distributed.sharding import MeshShape
from qwen_jax.engine import memory
from qwen_jax.sparse import budgets

_MESH_PAGE = 4096  # tokens a page on a mesh, if its parts are not too small then
_CPU_SLICES = (2048, 1024, 512, 256, 64)
_ACCELERATOR_SLICES = (32768, 8192, 1024, 128)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Capacity of an engine.

    Attributes:
        max_len: longest prompt and answer together, in tokens.
        max_seqs: requests that run at once; others wait.
        num_pages: cache pages, one of which is for padding; None for enough
            that `max_seqs` sequences of `max_len` fit.
        page: tokens per cache page; None to fit the model's chunks.
        slices: slice lengths in tokens that prefill is compiled for, largest first; None to
            fit the device and the model's chunks.
        vllm_parity: scale cached keys with the attention temperature, as vLLM
            does, instead of scaling queries twice.
        vocab_limit: exclusive upper bound of the token ids that are sampled; None for the
            whole vocabulary.
        backend: name of the attention backend; None for the device's preferred one.
        sparse: budgets of sparse prefill, for prompts over its threshold; None prefills
            all densely.
        least_recall: minimum attention recall per head, in [0, 1]; below it the slice is
            computed densely.
        dense_tail: tokens at the end of a prompt, where the question is, that are prefilled
            densely like the answer after them; 0 for none, as in vLLM.
        attention: False skips attention but not selection, to measure the time of everything
            else; answers then mean nothing.
        whole_slices: share prompt prefixes in whole slices only, not in pages, so
            that a prompt is computed in the same slices whatever else the engine is serving.
        prefix_tokens: tokens that `restore` will put into the cache, for which room is reserved
            beside what the requests add to them; 0 for none.

    Raises:
        ConfigError: if a number is out of range.
    """

    max_len: int
    max_seqs: int = 1
    num_pages: int | None = None
    page: int | None = None
    slices: tuple[int, ...] | None = None
    vllm_parity: bool = False
    vocab_limit: int | None = None
    backend: str | None = None
    sparse: SparseConfig | None = None
    least_recall: float = 0.0
    dense_tail: int = 64
    attention: bool = True
    whole_slices: bool = False
    prefix_tokens: int = 0

    def __post_init__(self):
        least = {
            "max_len": 1,
            "max_seqs": 1,
            "num_pages": 2,
            "page": 1,
            "vocab_limit": 1,
            "dense_tail": 0,
            "prefix_tokens": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < 2**31:
                raise ConfigError(f"{name}={value} must be at least {low}")
        if self.slices is not None:
            descending = sorted(set(self.slices), reverse=True)
            if not self.slices or list(self.slices) != descending or min(self.slices) < 1:
                raise ConfigError(f"slices={self.slices} must be positive, largest first")

    def pages_of(self, page: int) -> int:
        """Number of cache pages, the one for padding included, at `page` tokens per page."""
        if self.num_pages is not None:
            return self.num_pages
        own = -(-self.max_len // page) - self.prefix_tokens // page
        return self.max_seqs * own + -(-self.prefix_tokens // page) + 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayout:
    """Sizes that follow from a model, the configuration of an engine and its devices.

    Attributes:
        page: tokens per cache page.
        slices: slice lengths in tokens that prefill is compiled for, largest first.
        boundary: a slice never crosses a multiple of this many tokens; None for no such limit.
        table_len: length of a page table: pages of the longest sequence.
        num_pages: pages of the cache, one of which is for padding.
        columns: most key columns that a head reads in sparse prefill; None where no prompt is
            long enough for sparse prefill.
        slice_len: padded length, in tokens, of the largest slice that a prompt is computed in.
        tiles: tile sizes of the plans of sparse prefill.
    """

    page: int
    slices: tuple[int, ...]
    boundary: int | None
    table_len: int
    num_pages: int
    columns: int | None
    slice_len: int
    tiles: Tiles

    @classmethod
    def resolve(
        cls,
        model: ModelConfig,
        config: EngineConfig,
        *,
        platform: str,
        seq: int = 1,
        sparse_slices: bool = False,
    ) -> "EngineLayout":
        """Derives the layout of an engine.

        Args:
            platform: platform of its devices: "cpu", "gpu" or "tpu".
            seq: size of the mesh axis `seq`: devices that divide each page and slice.
            sparse_slices: use the slice lengths of sparse prefill even without its budgets.
        """
        geometry, sparse = model.dual_chunk, config.sparse
        page = config.page or _default_page(platform, geometry, parts=seq)
        slices = config.slices or _default_slices(
            platform, geometry, sparse=sparse_slices or sparse is not None, parts=seq
        )
        boundary = None
        if geometry is not None and geometry.chunk_len >= slices[0]:
            boundary = geometry.chunk_len
        table_len = -(-config.max_len // page)
        columns = None
        if sparse is not None and config.max_len > sparse.threshold:
            columns = budgets.most_columns(sparse, table_len * page)
        return cls(
            page=page,
            slices=slices,
            boundary=boundary,
            table_len=table_len,
            num_pages=config.pages_of(page),
            columns=columns,
            slice_len=_slice_bounds(0, config.max_len, slices, boundary)[1],
            tiles=budgets.tiles_on(platform),
        )

    def slice_bounds(
        self, start: int, stop: int, slices: tuple[int, ...] | None = None
    ) -> tuple[int, int]:
        """Returns the length of the slice at `start` of a prompt that ends at `stop`, and its
        padded size, both in tokens.

        Args:
            slices: lengths to choose from, largest first; None for those of the layout.
        """
        return _slice_bounds(start, stop, slices or self.slices, self.boundary)

    def budgets(self, sparse: SparseConfig, *, least_recall: float = 0.0) -> budgets.Budgets:
        """Returns the budgets of sparse prefill, on the default device."""
        return budgets.budgets(
            sparse,
            num_keys=self.table_len * self.page,
            least_recall=least_recall,
            tiles=self.tiles,
        )


def workload_budgets(
    sparse: SparseConfig, load: memory.Workload, *, platform: str
) -> budgets.Budgets:
    """The same as `EngineLayout.budgets`, for what `load` describes."""
    return budgets.budgets(
        sparse, num_keys=load.pages * load.page, tiles=budgets.tiles_on(platform)
    )


def load(
    model: ModelConfig,
    config: EngineConfig,
    mesh: MeshShape,
    *,
    platform: str,
    relayouts_weights: bool,
    dtype: str,
    window: int = 0,
) -> memory.Workload:
    """Returns the workload of each part of a mesh along `data`, for `memory.memory`.

    Args:
        platform: platform of the devices: "cpu", "gpu" or "tpu".
        relayouts_weights: see `memory.Workload`.
        dtype: dtype of weights and cache.
        window: tokens of a session that are held outside the cache too; rounded up to whole
            slices, in which they are moved.
    """
    layout = EngineLayout.resolve(model, config, platform=platform, seq=mesh.seq)
    return memory.Workload(
        tokens=config.max_len,
        page=layout.page,
        slice_len=layout.slice_len,
        cache_pages=layout.num_pages - 1,
        dtype=dtype,
        columns=layout.columns,
        window=-(-window // layout.slice_len) * layout.slice_len,
        relayouts_weights=relayouts_weights,
    )


def _default_page(platform: str, geometry: ChunkGeometry | None, *, parts: int = 1) -> int:
    """Returns the default page size in tokens.

    No part of a page straddles two chunks if their length allows it. On accelerators a part is
    a multiple of 128 tokens, as kernels want.

    Args:
        parts: devices that hold a part of each page.
    """
    least = 64 if platform == "cpu" else 128
    most = min(1024, max(_MESH_PAGE // parts, least))
    if platform == "cpu":
        if geometry is None:
            return parts * min(most, 512)
        return parts * (_divisor(geometry.chunk_len, least=64, most=most) or min(most, 256))
    most -= most % least
    if geometry is None:
        return parts * most
    fitting = (part for part in range(most, 0, -least) if geometry.chunk_len % part == 0)
    return parts * next(fitting, most)


def _divisor(length: int, *, least: int, most: int) -> int | None:
    """Returns the largest divisor of `length` in [least, most], or None."""
    return next((d for d in range(most, least - 1, -1) if length % d == 0), None)


def _default_slices(
    platform: str, geometry: ChunkGeometry | None, *, sparse: bool = False, parts: int = 1
) -> tuple[int, ...]:
    """Returns the default lengths of prefill slices in tokens, largest first.

    On a CPU, where chunks may be short, the largest divides the chunk, so that
    cutting at chunk borders leaves no small rest. Sparse ones are larger, since
    choosing the keys of each slice reads all of them.

    Args:
        parts: devices that divide the tokens of a slice between them.
    """
    sizes = _whole_slices(platform, geometry, sparse=sparse)
    return tuple(size - size % parts for size in sizes if size >= parts) or (parts,)


def _whole_slices(
    platform: str, geometry: ChunkGeometry | None, *, sparse: bool
) -> tuple[int, ...]:
    if platform != "cpu":
        return _ACCELERATOR_SLICES
    largest = _CPU_SLICES[0] * (2 if sparse else 1)
    if geometry is not None and geometry.chunk_len < 8 * largest:
        largest = _divisor(geometry.chunk_len, least=256, most=largest) or largest
    return (largest, *(size for size in _CPU_SLICES if size < largest))


def _slice_bounds(
    start: int, stop: int, slices: tuple[int, ...], boundary: int | None
) -> tuple[int, int]:
    length = min(stop - start, slices[0])
    if boundary is not None:
        length = min(length, boundary - start % boundary)
    return length, min(size for size in slices if size >= length)
