"""Configuration of an engine, and the layout that follows from it: pages, slices, tables."""

import dataclasses

from qwen_jax.config import ConfigError, ModelConfig, SparseConfig
from qwen_jax.distributed.sharding import MeshShape
from qwen_jax.engine import memory
from qwen_jax.engine.page_pool import default_page
from qwen_jax.engine.scheduler import default_slices, slice_bounds
from qwen_jax.sparse.budgets import most_columns


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
    """

    page: int
    slices: tuple[int, ...]
    boundary: int | None
    table_len: int
    num_pages: int
    columns: int | None
    slice_len: int

    @classmethod
    def resolve(
        cls, model: ModelConfig, config: EngineConfig, *, platform: str, seq: int = 1
    ) -> "EngineLayout":
        """The layout of an engine.

        Args:
            platform: of its devices ("cpu", "gpu" or "tpu").
            seq: devices that divide each page and slice between them.
        """
        geometry, sparse = model.dual_chunk, config.sparse
        page = config.page or default_page(platform, geometry, parts=seq)
        slices = config.slices or default_slices(
            platform, geometry, sparse=sparse is not None, parts=seq
        )
        boundary = None
        if geometry is not None and geometry.chunk_len >= slices[0]:
            boundary = geometry.chunk_len
        table_len = -(-config.max_len // page)
        columns = None
        if sparse is not None and config.max_len > sparse.threshold:
            columns = most_columns(sparse, table_len * page)
        return cls(
            page=page,
            slices=slices,
            boundary=boundary,
            table_len=table_len,
            num_pages=config.pages_of(page),
            columns=columns,
            slice_len=slice_bounds(0, config.max_len, slices, boundary)[1],
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
