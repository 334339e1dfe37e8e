"""What ships with the weights: ModelConfig, SparseConfig, GenerationConfig, and their files."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax import hf_fields
from qwen_jax.files import reading
from qwen_jax.files.reading import shown


class ConfigError(ValueError):
    """A configuration file or flag that cannot be used; the text names it and the way out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """Rotary frequencies stretched over a longer context (YaRN, arXiv:2309.00071).

    Attributes:
        factor: by which low frequencies are divided.
        original_len: training length, in tokens.
        attention_factor: of the cosines and sines; its square scales the logits.
        beta_fast: turns within `original_len` from which a frequency is left as it is.
        beta_slow: turns up to which it is divided; between both it is mixed.
        truncate: round the bounds of the mixture to whole dimensions.
    """

    factor: float
    original_len: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a Qwen2 or Qwen2.5 decoder (arXiv:2412.15115, table 1).

    Attributes:
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


# Bytes of a JSON file of a checkpoint; inline budgets of 48 layers with 40 heads take 100 kB.
_JSON_BYTES = 8 << 20

# What other values of `model_type` mean.
_OTHER_MODELS = {
    "qwen2_vl": "reads pictures",
    "qwen2_5_vl": "reads pictures",
    "qwen2_audio": "reads sound",
    "qwen2_5_omni": "reads sound and pictures",
    "qwen2_moe": "is a mixture of experts",
    "qwen3": "normalizes queries and keys",
    "qwen3_moe": "is a mixture of experts",
}


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ConfigError: if it is missing, no regular file or not valid JSON.
    """
    return reading.read_json(path, limit=_JSON_BYTES, error=ConfigError)


def model_config(directory: Path) -> ModelConfig:
    """The model that `directory/config.json` describes.

    Raises:
        ConfigError: if the file is missing, or a field is missing, unknown,
            contradictory or asks for something this package does not compute.
    """
    path = Path(directory) / "config.json"
    found = _fields(path)
    missing = [field for field in _REQUIRED if field not in found]
    if missing:
        raise ConfigError(f"{shown(path)} lacks {', '.join(missing)}")
    dtypes = {found[field] for field in ("torch_dtype", "dtype") if field in found}
    if len(dtypes) > 1:
        raise ConfigError(f"{shown(path)}: torch_dtype and dtype disagree: {sorted(dtypes)}")
    num_layers, num_heads = found["num_hidden_layers"], found["num_attention_heads"]
    embed_dim, max_len = found["hidden_size"], found["max_position_embeddings"]
    if "layer_types" in found and len(found["layer_types"]) != num_layers:
        raise ConfigError(
            f"{shown(path)}: layer_types has {len(found['layer_types'])} entries for "
            f"num_hidden_layers={num_layers}"
        )
    if "head_dim" not in found and embed_dim % num_heads:
        raise ConfigError(
            f"{shown(path)}: hidden_size={embed_dim} must be a multiple of "
            f"num_attention_heads={num_heads}"
        )
    _check_tokens(path, found, found["vocab_size"])
    rope_theta, yarn = _rope(path, found)
    geometry, original_len = _dual_chunk(path, found)
    try:
        return ModelConfig(
            num_layers=num_layers,
            vocab_size=found["vocab_size"],
            embed_dim=embed_dim,
            mlp_dim=found["intermediate_size"],
            num_heads=num_heads,
            num_kv_heads=found["num_key_value_heads"],
            head_dim=found.get("head_dim", embed_dim // num_heads),
            rope_theta=rope_theta,
            norm_eps=float(found["rms_norm_eps"]),
            tie_embeddings=found.get("tie_word_embeddings", False),
            max_len=max(max_len, int(yarn.factor * yarn.original_len)) if yarn else max_len,
            weights_dtype=dtypes.pop() if dtypes else "bfloat16",
            yarn=yarn,
            dual_chunk=geometry,
            original_len=original_len,
        )
    except ConfigError as error:
        raise ConfigError(f"{shown(path)}: {error}") from None


def notes(directory: Path) -> list[str]:
    """Sentences for the user about fields that are left unread, a file each.

    Raises:
        ConfigError: if a file cannot be used.
    """
    directory = Path(directory)
    files = {"config.json": (_fields(directory / "config.json"), hf_fields.MODEL)}
    files["generation_config.json"] = _generation(directory), hf_fields.GENERATION
    found = {
        name: reading.printable(", ".join(hf_fields.left_unread(fields, rules)))
        for name, (fields, rules) in files.items()
    }
    return [
        f"{name}: left unread, as they change no logits: {unread}"
        for name, unread in found.items()
        if unread
    ]


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
    main = Path(directory) / "config.json"
    path = Path(directory) / "sparse_attention_config.json"
    fields = _dual_chunk_fields(main, _fields(main)) or {}
    threshold = fields.get("sparse_attention_threshold", 32768)
    last_q = fields.get("sparse_attention_last_q", 64)
    inline = fields.get("sparse_attention_config")
    side = read_json(path) if file is None and os.path.lexists(path) else None
    if file is not None:
        layers, where = read_json(file), shown(file)
    elif side is not None and inline is not None and side != inline:
        raise ConfigError(
            f"{shown(path)} contradicts sparse_attention_config in config.json: remove one"
        )
    elif not fields.get("sparse_attention_enabled", True):
        return None
    elif side is not None:
        layers, where = side, shown(path)
    elif inline is not None:
        layers, where = inline, f"{shown(main)}: sparse_attention_config"
    else:
        return None
    vertical, slash = head_budgets(layers, where, model.num_layers, model.num_heads)
    return SparseConfig(vertical=vertical, slash=slash, threshold=threshold, last_q=last_q)


def last_q(directory: Path) -> int:
    """Queries of a slice that vote by `config.json`, whether there are budgets or not.

    Raises:
        ConfigError: if the file is missing or malformed.
    """
    path = Path(directory) / "config.json"
    return (_dual_chunk_fields(path, _fields(path)) or {}).get("sparse_attention_last_q", 64)


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
    heads = [str(head) for head in range(num_heads)]
    vertical, slash = [], []
    for number, layer in enumerate(layers):
        if not isinstance(layer, dict) or layer.keys() != set(heads):
            raise ConfigError(f"{where}: layer {number} must have heads 0 to {num_heads - 1}")
        for head, row in layer.items():
            if not _is_budget(row):
                raise ConfigError(
                    f"{where}: layer {number} head {head} must be "
                    '["vertical_and_slash", vertical, slash, score], got '
                    f"{reading.printable(repr(row), 80)}"
                )
        vertical.append(tuple(layer[head][1] for head in heads))
        slash.append(tuple(layer[head][2] for head in heads))
    return tuple(vertical), tuple(slash)


def generation_config(directory: Path) -> GenerationConfig:
    """Sampling defaults from `generation_config.json`; eos ids also from `config.json`.

    A checkpoint without the file gets greedy defaults and config.json's eos id.

    Raises:
        ConfigError: if a value is malformed or out of range, or a field is unknown or asks for
            a way of sampling that is not built here.
    """
    directory = Path(directory)
    found, model = _generation(directory), _fields(directory / "config.json")
    if "vocab_size" in model:
        _check_tokens(directory / "generation_config.json", found, model["vocab_size"])
    eos = (_listed(fields.get("eos_token_id", [])) for fields in (found, model))
    return GenerationConfig(
        eos_ids=tuple(dict.fromkeys(token for ids in eos for token in ids)),
        do_sample=found.get("do_sample", False),
        temperature=float(found.get("temperature", 1.0)),
        top_k=found.get("top_k", 0),
        top_p=float(found.get("top_p", 1.0)),
        min_p=float(found.get("min_p", 0.0)),
        repetition_penalty=float(found.get("repetition_penalty", 1.0)),
    )


_REQUIRED = (
    "hidden_size intermediate_size max_position_embeddings num_attention_heads "
    "num_hidden_layers num_key_value_heads rms_norm_eps vocab_size".split()
)


def _fields(path: Path) -> dict[str, Any]:
    """What a config.json says, each field by its rule.

    Raises:
        ConfigError: also if it is the configuration of another kind of model.
    """
    raw = reading.read_object(path, limit=_JSON_BYTES, error=ConfigError)
    kind = raw.pop("model_type", None)
    if kind != "qwen2":
        meaning = _OTHER_MODELS.get(kind) if isinstance(kind, str) else None
        must = "is not 'qwen2', the only architecture built here (Qwen2 and Qwen2.5, dense, text)"
        must = f"{must}: that one {meaning}" if meaning else must
        raise hf_fields.refusal(shown(path), "model_type", kind, must, ConfigError)
    return hf_fields.checked(shown(path), raw, hf_fields.MODEL, ConfigError)


def _generation(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    if not os.path.lexists(path):
        return {}
    raw = reading.read_object(path, limit=_JSON_BYTES, error=ConfigError)
    return hf_fields.checked(shown(path), raw, hf_fields.GENERATION, ConfigError)


def _check_tokens(path: Path, found: Mapping[str, Any], vocab_size: int) -> None:
    for field in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = found.get(field, [])
        if any(token >= vocab_size for token in _listed(value)):
            must = f"must be under vocab_size={vocab_size}"
            raise hf_fields.refusal(shown(path), field, value, must, ConfigError)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _rope(path: Path, found: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    """Base and scaling of rotary positions, in either spelling.

    Raises:
        ConfigError: if they contradict each other, or another kind of scaling is asked for.
    """
    given = {}
    for field in ("rope_scaling", "rope_parameters"):
        raw = found.get(field) or {}
        kind = raw.get("rope_type") or raw.get("type") or "default"
        where = f"{shown(path)}: {field}"
        if kind not in ("default", "yarn"):
            raise ConfigError(
                f"{where} is of type {reading.printable(repr(kind), 80)}: only 'yarn' and "
                "'default' are built here; remove it, and for long texts use Dual Chunk"
            )
        rules = hf_fields.YARN if kind == "yarn" else hf_fields.ROPE
        fields = hf_fields.checked(where, raw, rules, ConfigError)
        if fields.pop("type", kind) != fields.pop("rope_type", kind):
            raise ConfigError(f"{where}: type and rope_type disagree")
        if raw:
            given[field] = {"kind": kind, **fields}
    thetas = {fields["rope_theta"] for fields in (found, *given.values()) if "rope_theta" in fields}
    if len(thetas) > 1:
        raise ConfigError(f"{shown(path)} gives rope_theta twice, as {sorted(thetas)}")
    theta = float(thetas.pop()) if thetas else 10000.0  # as transformers
    stretched = [
        {name: fields[name] for name in fields.keys() - {"rope_theta", "partial_rotary_factor"}}
        for fields in given.values()
    ]
    if len(stretched) > 1 and stretched[0] != stretched[1]:
        raise ConfigError(f"{shown(path)}: rope_scaling contradicts rope_parameters: remove one")
    if not stretched or stretched[0]["kind"] == "default":
        return theta, None
    where = f"{shown(path)}: {next(iter(given))}"
    return theta, _yarn(where, stretched[0], found["max_position_embeddings"])


def _yarn(where: str, fields: Mapping[str, Any], max_len: int) -> Yarn:
    """YaRN's numbers, with the defaults of transformers."""
    if "factor" not in fields:
        raise ConfigError(f"{where} lacks factor")
    factor = float(fields["factor"])
    original_len = fields.get("original_max_position_embeddings", max_len)
    if factor * original_len >= 2**31:
        raise ConfigError(f"{where}: factor={factor:g} times {original_len:,} tokens is over 2^31")
    fast, slow = float(fields.get("beta_fast", 32)), float(fields.get("beta_slow", 1))
    if fast < slow:
        raise ConfigError(f"{where}: beta_fast={fast:g} must be at least beta_slow={slow:g}")

    def attention(scale: int | float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    one, other = fields.get("mscale"), fields.get("mscale_all_dim")
    default = attention(one) / attention(other) if one and other else attention(1.0)
    return Yarn(
        factor=factor,
        original_len=original_len,
        attention_factor=float(fields.get("attention_factor", default)),
        beta_fast=fast,
        beta_slow=slow,
        truncate=fields.get("truncate", True),
    )


def _dual_chunk_fields(path: Path, found: Mapping[str, Any]) -> dict[str, Any] | None:
    raw = found.get("dual_chunk_attention_config")
    if raw is None:
        return None
    where = f"{shown(path)}: dual_chunk_attention_config"
    return hf_fields.checked(where, raw, hf_fields.DUAL_CHUNK, ConfigError)


def _dual_chunk(path: Path, found: Mapping[str, Any]) -> tuple[ChunkGeometry | None, int]:
    """Sizes of DCA, and the training length of its temperature."""
    fields = _dual_chunk_fields(path, found)
    if fields is None:
        return None, 0
    try:
        geometry = ChunkGeometry(fields.get("chunk_size", 8192), fields.get("local_size", 1024))
    except ValueError as error:
        raise ConfigError(f"{shown(path)}: dual_chunk_attention_config: {error}") from None
    return geometry, fields.get("original_max_position_embeddings", 0)


def _is_budget(row: Any) -> bool:
    """Whether a row of a budgets file has the published form."""
    return (
        isinstance(row, list)
        and len(row) in (3, 4)
        and row[0] == "vertical_and_slash"
        and all(type(size) is int and 0 < size < 2**31 for size in row[1:3])
        and all(type(score) in (int, float) for score in row[3:])
    )
