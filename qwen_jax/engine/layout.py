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
        page: tokens a page; None to fit the model's chunks.
        slices: lengths that prefill is compiled for, largest first; None to
            fit the device and the model's chunks.
        vllm_parity: scale cached keys with the attention temperature, as vLLM
            does, instead of scaling queries twice.
        vocab_limit: ids from here on are never sampled; None for all of them.
        backend: of the attention operations; None for the device's preferred one.
        sparse: budgets of sparse prefill, for prompts over its threshold; None prefills
            all densely.
        least_recall: a head that recalls less of a slice is computed densely.
        dense_tail: tokens at the end of a prompt, where the question is, that are prefilled
            densely like the answer after them; 0 for none, as in vLLM.
        attention: False leaves it out, selection aside: answers mean nothing then, and what
            all else takes can be measured.
        whole_slices: share the beginnings of prompts by whole slices only, not by pages, so
            that a prompt is computed in the same slices whatever else the engine is serving.
        prefix_tokens: tokens that `restore` will put into the cache, for which there is room beside
            what the requests add to them; 0 for none.

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
        """Pages of the cache, if they have so many tokens."""
        if self.num_pages is not None:
            return self.num_pages
        own = -(-self.max_len // page) - self.prefix_tokens // page
        return self.max_seqs * own + -(-self.prefix_tokens // page) + 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayout:
    """Sizes that follow from a model, the configuration of an engine and its devices.

    Attributes:
        page: tokens a page.
        slices: lengths that prefill is compiled for, largest first.
        boundary: tokens of which a slice never crosses a multiple; None for no such limit.
        table_len: pages of the longest sequence.
        num_pages: pages of the cache, one of which is for padding.
        columns: that a head of sparse prefill reads at most; None where no prompt is long enough
            for sparse prefill.
        slice_len: tokens of the largest slice that a prompt is computed in, padded.
        tiles: of the plans of sparse prefill.
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
        """The layout of an engine.

        Args:
            platform: of its devices ("cpu", "gpu" or "tpu").
            seq: devices that divide each page and slice between them.
            sparse_slices: lengths of slices as of sparse prefill, also without its budgets.
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
        """Tokens that the slice at `start` takes of those before `stop`, and its padded size.

        Args:
            slices: lengths to choose from, largest first; None for those of the layout.
        """
        return _slice_bounds(start, stop, slices or self.slices, self.boundary)

    def budgets(self, sparse: SparseConfig, *, least_recall: float = 0.0) -> budgets.Budgets:
        """The budgets of sparse prefill, on the default device."""
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
    """What an engine runs on each part of a mesh along `data`, to be measured by `budget`.

    Args:
        platform: of the devices ("cpu", "gpu" or "tpu").
        relayouts_weights: see `memory.Workload`, as `dtype`.
        window: tokens of a session, at least, that are outside the cache too: they are moved
            in whole slices.
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
    """Tokens a page, so that no part of it straddles two chunks if their length allows it.

    On accelerators a part is a multiple of 128 tokens, as kernels want.

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
    """The largest divisor of a length from `least` to `most`, or None."""
    return next((d for d in range(most, least - 1, -1) if length % d == 0), None)


def _default_slices(
    platform: str, geometry: ChunkGeometry | None, *, sparse: bool = False, parts: int = 1
) -> tuple[int, ...]:
    """Lengths of prefill slices, largest first.

    On a CPU, where chunks may be short, the largest divides the chunk, so that
    cutting at chunk borders leaves no small rest. Sparse ones are larger, since the
    vote of each slice reads all keys.

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
