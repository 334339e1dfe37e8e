"""Configurations that ship with the weights: ModelConfig, SparseConfig, GenerationConfig."""

import dataclasses
import math

from pallas_kernels.geometry import ChunkGeometry


class ConfigError(ValueError):
    """Error of a configuration file or flag that cannot be used; names it and the remedy."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """Rotary frequencies stretched over a longer context (YaRN, arXiv:2309.00071).

    Attributes:
        factor: factor that divides low frequencies.
        original_len: training length, in tokens.
        attention_factor: factor on cosines and sines; its square scales the attention logits.
        beta_fast: a frequency of at least this many turns within `original_len` is unchanged.
        beta_slow: a frequency of at most this many turns is divided by `factor`; between
            `beta_slow` and `beta_fast` the two are interpolated.
        truncate: round the bounds of the interpolation to whole dimensions.
    """

    factor: float
    original_len: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a dense decoder, as Qwen2.5's (arXiv:2412.15115, table 1).

    Attributes:
        model_type: of config.json, by which `qwen_jax.models.families` knows what computes it.
        vocab_padding: rows of zeros after those of the vocabulary, in arrays on devices alone;
            no logits are given for them (`sharding.padded`).
        max_len: longest sequence the checkpoint declares, in tokens.
        weights_dtype: "bfloat16", "float16" or "float32", as stored.
        yarn: stretched rotary frequencies, or None.
        dual_chunk: DCA sizes, or None for a model that attends over one window.
        original_len: training length of the attention temperature, in tokens;
            0 switches the temperature off (arXiv:2501.15383, equation 1).
    """

    num_layers: int
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    max_len: int
    weights_dtype: str = "bfloat16"
    vocab_padding: int = 0
    yarn: Yarn | None = None
    dual_chunk: ChunkGeometry | None = None
    original_len: int = 0
    model_type: str = "qwen2"

    def __post_init__(self):
        for name in ("num_layers", "vocab_size", "embed_dim", "mlp_dim", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}: "
                "each kv head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"{self.head_dim=} must be even: rotary positions turn pairs")
        if self.yarn is not None and self.dual_chunk is not None:
            raise ConfigError(
                "YaRN (rope_scaling) and Dual Chunk Attention both stretch positions: remove one "
                "of them"
            )

    @property
    def compute_dtype(self) -> str:
        """Dtype of weights and cache on accelerators: "bfloat16" or "float32"."""
        return "float32" if self.weights_dtype == "float32" else "bfloat16"

    @property
    def kv_elements_per_token(self) -> int:
        """Number of elements that one token adds to the cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def temperature(self, length: int) -> float:
        """Returns the factor s(n) on queries and on keys at a prompt of `length` tokens.

        The product of the two scales the attention logits.

        `s(n) = max(1, 0.1 ln(n / original_len) + 1)` (arXiv:2501.15383, equation 1).
        """
        if not self.original_len or length <= self.original_len:
            return 1.0
        return 0.1 * math.log(length / self.original_len) + 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparseConfig:
    """Budgets of vertical-slash sparse prefill, per layer and query head.

    Attributes:
        vertical: key columns kept, `[layers][heads]`.
        slash: diagonals kept, `[layers][heads]`.
        threshold: prompts longer than this many tokens are prefilled sparsely.
        last_q: queries at the end of a slice that vote for columns and diagonals.
    """

    vertical: tuple[tuple[int, ...], ...]
    slash: tuple[tuple[int, ...], ...]
    threshold: int = 32768
    last_q: int = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """Defaults of sampling that ship with the weights.

    Attributes:
        eos_ids: token ids that end an answer.
        do_sample: False means greedy.
    """

    eos_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
