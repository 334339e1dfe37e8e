"""What ships with the weights: ModelConfig, SparseConfig, GenerationConfig, and their files."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from pallas_kernels.geometry import ChunkGeometry


class ConfigError(ValueError):
    """A configuration file or flag that cannot be used; the text names it and the way out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a Qwen2 or Qwen2.5 decoder (arXiv:2412.15115, table 1).

    Attributes:
        max_len: longest sequence the checkpoint declares, in tokens.
        weights_dtype: "bfloat16" or "float32", as stored.
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
    dual_chunk: ChunkGeometry | None = None
    original_len: int = 0

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

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that one token adds to the cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def temperature(self, length: int) -> float:
        """Factor s(n) on queries and again on keys; their product scales the logits.

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
        last_q: queries at the end of a piece that vote for columns and diagonals.
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


# Fields of config.json that carry no information for inference.
_IGNORED = frozenset(
    "_name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward "
    "initializer_range max_window_layers pad_token_id sliding_window "
    "transformers_version use_cache eos_token_id problem_type id2label label2id "
    "is_encoder_decoder output_attentions output_hidden_states return_dict".split()
)
_REQUIRED = (
    "hidden_size intermediate_size max_position_embeddings num_attention_heads "
    "num_hidden_layers num_key_value_heads rms_norm_eps vocab_size".split()
)
_OPTIONAL = frozenset(
    "model_type hidden_act head_dim rope_theta rope_scaling rope_parameters tie_word_embeddings "
    "torch_dtype dtype layer_types use_sliding_window dual_chunk_attention_config".split()
)
_DUAL_CHUNK = frozenset(
    "chunk_size local_size original_max_position_embeddings sparse_attention_config "
    "sparse_attention_enabled sparse_attention_threshold sparse_attention_last_q".split()
)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ConfigError: if it is missing, not UTF-8 or not JSON.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def model_config(directory: Path) -> ModelConfig:
    """The model that `directory/config.json` describes.

    Raises:
        ConfigError: if the file is missing, or a field is missing, unknown,
            contradictory or asks for something this package does not compute.
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return _Fields(path, raw).model()


@dataclasses.dataclass(frozen=True, slots=True)
class _Fields:
    """A config.json whose fields are checked as they are taken."""

    path: Path
    raw: dict[str, Any]

    def fail(self, field: str, why: str) -> ConfigError:
        return ConfigError(f"{self.path}: {field}={self.raw.get(field)!r} {why}")

    def number(self, field: str, kind: type, default: Any = None) -> Any:
        value = self.raw.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise self.fail(field, f"must be of type {kind.__name__}")
        if not 0 < value < 2**31:
            raise self.fail(field, "must lie in (0, 2^31)")
        return kind(value)

    def model(self) -> ModelConfig:
        raw = self.raw
        if raw.get("model_type") != "qwen2":
            raise self.fail("model_type", "is not 'qwen2', the only architecture built here")
        missing = [field for field in _REQUIRED if raw.get(field) is None]
        if missing:
            raise ConfigError(f"{self.path} lacks {', '.join(missing)}")
        unknown = sorted(raw.keys() - _IGNORED - _OPTIONAL - set(_REQUIRED))
        if unknown:
            raise ConfigError(
                f"{self.path} has fields this package does not know: {', '.join(unknown)}; "
                "remove them if they do not change the model"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise self.fail("hidden_act", "must be 'silu'")
        if raw.get("use_sliding_window"):
            raise self.fail("use_sliding_window", "is not supported: set it to false")
        if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
            raise self.fail("layer_types", "must all be 'full_attention'")
        tied = raw.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise self.fail("tie_word_embeddings", "must be true or false")
        embed_dim = self.number("hidden_size", int)
        num_heads = self.number("num_attention_heads", int)
        if raw.get("head_dim") is None and embed_dim % num_heads:
            raise self.fail("hidden_size", f"must be a multiple of num_attention_heads={num_heads}")
        geometry, original_len = self.dual_chunk()
        try:
            return ModelConfig(
                num_layers=self.number("num_hidden_layers", int),
                vocab_size=self.number("vocab_size", int),
                embed_dim=embed_dim,
                mlp_dim=self.number("intermediate_size", int),
                num_heads=num_heads,
                num_kv_heads=self.number("num_key_value_heads", int),
                head_dim=self.number("head_dim", int, embed_dim // num_heads),
                rope_theta=self.rope_theta(),
                norm_eps=self.number("rms_norm_eps", float),
                tie_embeddings=tied,
                max_len=self.number("max_position_embeddings", int),
                weights_dtype=self.weights_dtype(),
                dual_chunk=geometry,
                original_len=original_len,
            )
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def rope_theta(self) -> float:
        parameters = self.raw.get("rope_parameters") or {}
        scaling = self.raw.get("rope_scaling") or {}
        for field, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if not isinstance(value, dict):
                raise self.fail(field, "must be an object or null")
            kind = value.get("rope_type", value.get("type", "default"))
            if kind != "default" or value.keys() - {"rope_type", "type", "rope_theta"}:
                raise self.fail(
                    field, "scales positions, which is not supported: remove it and use Dual Chunk"
                )
        thetas = {
            value["rope_theta"]
            for value in (parameters, scaling, self.raw)
            if value.get("rope_theta") is not None
        }
        if len(thetas) > 1:
            raise ConfigError(f"{self.path} gives rope_theta twice, as {sorted(thetas)}")
        if not thetas:
            raise ConfigError(f"{self.path} lacks rope_theta")
        return _Fields(self.path, {"rope_theta": thetas.pop()}).number("rope_theta", float)

    def weights_dtype(self) -> str:
        dtypes = {self.raw[field] for field in ("torch_dtype", "dtype") if self.raw.get(field)}
        if len(dtypes) > 1:
            raise ConfigError(f"{self.path}: torch_dtype and dtype disagree: {sorted(dtypes)}")
        dtype = dtypes.pop() if dtypes else "bfloat16"
        if dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"{self.path}: dtype={dtype!r} must be 'bfloat16' or 'float32'")
        return dtype

    def dual_chunk(self) -> tuple[ChunkGeometry | None, int]:
        raw = self.raw.get("dual_chunk_attention_config")
        if raw is None:
            return None, 0
        if not isinstance(raw, dict):
            raise self.fail("dual_chunk_attention_config", "must be an object or null")
        unknown = sorted(raw.keys() - _DUAL_CHUNK)
        if unknown:
            raise ConfigError(
                f"{self.path}: dual_chunk_attention_config has unknown fields {', '.join(unknown)}"
            )
        inner = _Fields(self.path, raw)
        original_len = raw.get("original_max_position_embeddings", 0)
        if isinstance(original_len, bool) or not isinstance(original_len, int) or original_len < 0:
            raise inner.fail("original_max_position_embeddings", "must be an integer >= 0")
        try:
            geometry = ChunkGeometry(
                inner.number("chunk_size", int, 8192), inner.number("local_size", int, 1024)
            )
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{self.path}: dual_chunk_attention_config: {error}") from None
        inner.sparse()
        return geometry, original_len

    def sparse(self) -> tuple[int, int, bool]:
        """Threshold, queries that vote and whether sparse prefill is enabled."""
        enabled = self.raw.get("sparse_attention_enabled")
        if enabled is not None and not isinstance(enabled, bool):
            raise self.fail("sparse_attention_enabled", "must be true or false")
        threshold = self.raw.get("sparse_attention_threshold")
        threshold = 32768 if threshold is None else threshold
        if type(threshold) is not int or threshold < 0:
            raise self.fail("sparse_attention_threshold", "must be an integer >= 0")
        last_q = self.number("sparse_attention_last_q", int, 64)
        return threshold, last_q, enabled is not False


def sparse_config(
    directory: Path, model: ModelConfig, file: Path | None = None
) -> SparseConfig | None:
    """Sparse budgets, from `sparse_attention_config.json` or inline in `config.json`.

    None if the checkpoint has none or disables them. For the format see `head_budgets`.

    Args:
        file: budgets to read instead of the checkpoint's own, which may be disabled.

    Raises:
        ConfigError: if the budgets do not fit the model or are malformed.
    """
    directory = Path(directory)
    main, path = directory / "config.json", directory / "sparse_attention_config.json"
    fields = _Fields(main, read_json(main).get("dual_chunk_attention_config") or {})
    threshold, last_q, enabled = fields.sparse()
    if file is not None:
        vertical, slash = head_budgets(read_json(file), file, model.num_layers, model.num_heads)
        return SparseConfig(vertical=vertical, slash=slash, threshold=threshold, last_q=last_q)
    side = read_json(path) if path.exists() else None
    inline = fields.raw.get("sparse_attention_config")
    if side is not None and inline is not None and side != inline:
        raise ConfigError(f"{path} contradicts sparse_attention_config in config.json: remove one")
    layers, where = (inline, f"{main}: sparse_attention_config") if side is None else (side, path)
    if layers is None or not enabled:
        return None
    vertical, slash = head_budgets(layers, where, model.num_layers, model.num_heads)
    return SparseConfig(vertical=vertical, slash=slash, threshold=threshold, last_q=last_q)


def last_q(directory: Path) -> int:
    """Queries of a slice that vote by `config.json`, whether there are budgets or not.

    Raises:
        ConfigError: if the file is missing or malformed.
    """
    path = Path(directory) / "config.json"
    return _Fields(path, read_json(path).get("dual_chunk_attention_config") or {}).sparse()[1]


def head_budgets(
    layers: Any, where: Path | str, num_layers: int, num_heads: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Columns and diagonals of every layer and head, from a file in the published format.

    That is a list with one object per layer, from the query head's number as a string to
    `["vertical_and_slash", vertical, slash, score]`.

    Args:
        layers: the parsed JSON.
        where: what errors call it.

    Raises:
        ConfigError: if it has another form or size.
    """
    if not isinstance(layers, list) or len(layers) != num_layers:
        raise ConfigError(f"{where} must hold a list of {num_layers} layers")
    vertical, slash = [], []
    for number, layer in enumerate(layers):
        heads = [str(head) for head in range(num_heads)]
        if not isinstance(layer, dict) or sorted(layer) != sorted(heads):
            raise ConfigError(f"{where}: layer {number} must have heads 0 to {num_heads - 1}")
        rows = [layer[head] for head in heads]
        for head, row in zip(heads, rows, strict=True):
            if (
                not isinstance(row, list)
                or len(row) < 3
                or row[0] != "vertical_and_slash"
                or not all(type(size) is int and 0 < size < 2**31 for size in row[1:3])
            ):
                raise ConfigError(
                    f"{where}: layer {number} head {head} must be "
                    f'["vertical_and_slash", vertical, slash, score], got {row!r}'
                )
        vertical.append(tuple(row[1] for row in rows))
        slash.append(tuple(row[2] for row in rows))
    return tuple(vertical), tuple(slash)


def generation_config(directory: Path) -> GenerationConfig:
    """Sampling defaults from `generation_config.json`; eos ids also from `config.json`.

    A checkpoint without the file gets greedy defaults and config.json's eos id.

    Raises:
        ConfigError: if a value is malformed or out of range.
    """
    directory = Path(directory)
    path = directory / "generation_config.json"
    raw = read_json(path) if path.exists() else {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    eos: list[int] = []
    for source in (raw, read_json(directory / "config.json")):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            raise ConfigError(f"{path}: eos_token_id={value!r} must be token ids")
        eos.extend(token for token in ids if token not in eos)
    ranges = {
        "temperature": (1.0, 0.0, 1e4),
        "top_k": (0, 0, 2**31),
        "top_p": (1.0, 0.0, 1.0),
        "min_p": (0.0, 0.0, 1.0),
        "repetition_penalty": (1.0, 1e-4, 1e4),
    }
    values = {}
    for field, (default, low, high) in ranges.items():
        value = raw.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{path}: {field}={value!r} must be a number")
        if not low <= value <= high:
            raise ConfigError(f"{path}: {field}={value!r} must lie in [{low}, {high}]")
        values[field] = type(default)(value)
    return GenerationConfig(
        eos_ids=tuple(eos), do_sample=bool(raw.get("do_sample", False)), **values
    )
