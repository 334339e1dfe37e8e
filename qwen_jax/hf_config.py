"""Hugging Face's JSON files: rules for each field, and the configurations read from them.

A field that is null counts as absent, as in transformers.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import ConfigError, GenerationConfig, ModelConfig, SparseConfig, Yarn
from qwen_jax.files import reading
from qwen_jax.files.reading import printable, shown


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """Rule for the values of a field.

    Attributes:
        must: end of the error `field=value ...` about any other value.
        read: False for a field that does not affect the numbers computed and is ignored.
        usual: whether published checkpoints have the field, so that ignoring it needs no note.
    """

    fits: Callable[[Any], bool]
    must: str
    read: bool = True
    usual: bool = False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def integer(low: int, high: int = 2**31 - 1) -> Rule:
    """Allows integers from `low` to `high`."""
    return Rule(
        lambda value: type(value) is int and low <= value <= high,
        f"must be an integer from {low} to {high}",
    )


def number(low: int | float, high: int | float, *, over: bool = False) -> Rule:
    """Allows numbers from `low` to `high`.

    Args:
        over: exclude `low` itself.
    """
    return Rule(
        lambda value: _is_number(value) and low <= value <= high and not (over and value == low),
        f"must be a number {f'over {low:g} and at most' if over else f'from {low:g} to'} {high:g}",
    )


def only(value: Any, must: str) -> Rule:
    """Allows one value of the same type, where 1 and 1.0 are equal."""
    return Rule(
        lambda found: found == value and isinstance(found, bool) == isinstance(value, bool), must
    )


def off(value: Any) -> Rule:
    """Allows one value, which switches off a feature that is not implemented."""
    return only(value, f"is not supported: remove it, or set it to {_json(value)}")


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def unread(rule: Rule | None = None, *, usual: bool = False) -> Rule:
    """Allows a field that does not affect the numbers computed; any value without a rule."""
    fits, must = (rule.fits, rule.must) if rule else (lambda _: True, "")
    return Rule(fits, must, read=False, usual=usual)


TRUTH = Rule(lambda value: isinstance(value, bool), "must be true or false")
TEXT = Rule(lambda value: isinstance(value, str), "must be a text")
OBJECT = Rule(lambda value: isinstance(value, dict), "must be an object or null")
_COUNT = integer(0)
_TOKEN = integer(0)
_TOKENS = Rule(
    lambda value: all(map(_TOKEN.fits, value if isinstance(value, list) else [value])),
    "must be token ids, whole numbers from 0",
)
_NULL = Rule(lambda _: False, "is not supported: remove it")
_QUANTIZED = Rule(
    lambda value: value == {},
    "says that the weights are quantized (AWQ, GPTQ, bitsandbytes, FP8, MLX), which is not "
    "supported: get the checkpoint in BF16, F16 or F32",
)


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_NOT_SAMPLED = {
    # Searches, filters and penalties that transformers has beside those built here.
    **_rules(off(1), "num_beams num_beam_groups num_return_sequences typical_p guidance_scale"),
    **_rules(off(1), "encoder_repetition_penalty"),
    **_rules(off(0), "min_length min_new_tokens no_repeat_ngram_size epsilon_cutoff eta_cutoff"),
    **_rules(off(0), "encoder_no_repeat_ngram_size diversity_penalty penalty_alpha"),
    **_rules(off([]), "stop_strings suppress_tokens begin_suppress_tokens bad_words_ids"),
    **_rules(off([]), "force_words_ids constraints sequence_bias"),
    **_rules(off(False), "token_healing"),
    **_rules(_NULL, "forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty"),
    **_rules(_NULL, "watermarking_config dola_layers top_h max_time"),
    # Lengths, for which there are flags, what is returned beside answers, and ways to be faster.
    **_rules(unread(_COUNT), "max_length max_new_tokens"),
    **_rules(unread(TRUTH), "output_scores output_logits output_attentions output_hidden_states"),
    **_rules(unread(TRUTH), "return_dict_in_generate use_cache low_memory is_assistant use_mtp"),
    **_rules(unread(TRUTH), "remove_invalid_values renormalize_logits disable_compile"),
    **_rules(unread(), "early_stopping length_penalty cache_implementation cache_config"),
    **_rules(unread(), "max_cache_len prefill_chunk_size compile_config speculation_type"),
    **_rules(unread(), "continuous_batching_config num_assistant_tokens assistant_early_exit"),
    **_rules(unread(), "num_assistant_tokens_schedule assistant_confidence_threshold"),
    **_rules(unread(), "assistant_lookbehind target_lookbehind assistant_ensemble_weight"),
    **_rules(unread(), "prompt_lookup_num_tokens max_matching_ngram_size"),
}

GENERATION = {
    "eos_token_id": _TOKENS,
    "do_sample": TRUTH,
    "temperature": number(0, 1e4),
    "top_k": _COUNT,
    "top_p": number(0, 1),
    "min_p": number(0, 1),
    "repetition_penalty": number(1e-4, 1e4),
    **_rules(unread(_TOKENS, usual=True), "bos_token_id pad_token_id"),
    **_rules(unread(TEXT, usual=True), "transformers_version"),
    **_rules(unread(), "_from_model_config decoder_start_token_id chat_format max_window_size"),
    **_NOT_SAMPLED,
}
"""Rules for generation_config.json."""

_elsewhere = "belongs into generation_config.json: move it there"

MODEL = {
    "architectures": Rule(
        lambda value: isinstance(value, list) and "Qwen2ForCausalLM" in value,
        'must be ["Qwen2ForCausalLM"], the only architecture built here',
    ),
    "num_hidden_layers": integer(1, 1024),
    "vocab_size": integer(1, 2**24),
    "hidden_size": integer(1, 2**20),
    "intermediate_size": integer(1, 2**24),
    "num_attention_heads": integer(1, 4096),
    "num_key_value_heads": integer(1, 4096),
    "head_dim": integer(1, 2**16),
    "max_position_embeddings": integer(1),
    "rms_norm_eps": number(0, 1, over=True),
    "rope_theta": number(1, 1e15, over=True),
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "tie_word_embeddings": TRUTH,
    **_rules(
        Rule(
            lambda value: value in ("bfloat16", "float16", "float32"),
            "must be 'bfloat16', 'float16' or 'float32'",
        ),
        "torch_dtype dtype",
    ),
    "layer_types": Rule(
        lambda value: isinstance(value, list) and all(kind == "full_attention" for kind in value),
        "must be a list of 'full_attention'",
    ),
    "dual_chunk_attention_config": OBJECT,
    "hidden_act": only("silu", "must be 'silu'"),
    "use_sliding_window": off(False),
    "eos_token_id": _TOKENS,
    # What other models of the same code have, which a checkpoint may also switch off by name.
    **_rules(off(False), "use_mrope use_dynamic_ntk use_logn_attn mlp_bias qk_norm use_qk_norm"),
    **_rules(off(False), "is_encoder_decoder tie_encoder_decoder add_cross_attention"),
    **_rules(off(True), "attention_bias qkv_bias is_causal"),
    **_rules(off(1), "partial_rotary_factor rotary_pct pretraining_tp"),
    **_rules(off(0), "chunk_size_feed_forward"),
    **_rules(off({}), "pruned_heads"),
    **_rules(_NULL, "cross_attention_hidden_size"),
    **_rules(_QUANTIZED, "quantization_config quantization compression_config"),
    # Defaults of generation that old versions of transformers keep here.
    **_NOT_SAMPLED,
    "do_sample": only(False, _elsewhere),
    "top_k": only(50, _elsewhere),
    **_rules(only(1, _elsewhere), "temperature top_p repetition_penalty"),
    "min_p": only(0, _elsewhere),
    # What changes no number.
    **_rules(unread(_TOKENS, usual=True), "bos_token_id pad_token_id"),
    **_rules(unread(number(0, 1), usual=True), "attention_dropout initializer_range"),
    **_rules(unread(_COUNT, usual=True), "max_window_layers sliding_window"),
    **_rules(unread(TRUTH, usual=True), "use_cache output_attentions output_hidden_states"),
    **_rules(unread(TRUTH, usual=True), "return_dict"),
    **_rules(unread(TEXT, usual=True), "transformers_version _name_or_path problem_type"),
    **_rules(unread(usual=True), "id2label label2id num_labels"),
    **_rules(unread(), "unsloth_version unsloth_fixed unsloth_tiled_mlp model_name"),
    **_rules(unread(), "_attn_implementation _attn_implementation_autoset attn_implementation"),
    **_rules(unread(), "_attn_implementation_internal _experts_implementation_internal"),
    **_rules(unread(), "_flash_attn_2_enabled use_flash_attention_2 use_flash_attn _commit_hash"),
    **_rules(unread(), "auto_map custom_pipelines custom_object_save name_or_path"),
    **_rules(unread(), "torchscript use_bfloat16 tf_legacy_loss bf16 fp16 fp32 is_decoder"),
    **_rules(unread(), "gradient_checkpointing neftune_noise_alpha"),
    **_rules(unread(), "finetuning_task task_specific_params tokenizer_class prefix"),
    **_rules(unread(), "model_max_length tokenizer_model_max_length tokenizer_padding_side"),
    **_rules(unread(), "sep_token_id decoder_start_token_id keys_to_ignore_at_inference"),
    **_rules(unread(), "trl_version peft_version axolotl_version transformers.js_config"),
}
"""Rules for config.json, except `model_type`."""

DUAL_CHUNK = {
    "chunk_size": integer(1),
    "local_size": integer(1),
    "original_max_position_embeddings": integer(0),
    "sparse_attention_config": Rule(lambda _: True, ""),
    "sparse_attention_enabled": TRUTH,
    "sparse_attention_threshold": integer(0),
    "sparse_attention_last_q": integer(1),
}
"""Rules for the object `dual_chunk_attention_config` of config.json."""

ROPE = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": MODEL["rope_theta"],
    "partial_rotary_factor": off(1),
}
"""Rules for the objects `rope_scaling` and `rope_parameters` of config.json, for any type."""

YARN = ROPE | {
    "factor": number(1, 1024),
    "original_max_position_embeddings": integer(1),
    "attention_factor": number(0, 100, over=True),
    "beta_fast": number(0, 1e6, over=True),
    "beta_slow": number(0, 1e6, over=True),
    "mscale": number(0, 100),
    "mscale_all_dim": number(0, 100),
    "truncate": TRUTH,
}
"""Rules for the same objects for YaRN (arXiv:2309.00071)."""

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


_REQUIRED = (
    "hidden_size intermediate_size max_position_embeddings num_attention_heads "
    "num_hidden_layers num_key_value_heads rms_norm_eps vocab_size".split()
)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ConfigError: if it is missing, no regular file or not valid JSON.
    """
    return reading.read_json(path, limit=_JSON_BYTES, error=ConfigError)


def model_config(directory: Path) -> ModelConfig:
    """Reads the model configuration in `directory/config.json`.

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
    """Returns sentences for the user about fields that are ignored, one per file.

    Raises:
        ConfigError: if a file cannot be used.
    """
    directory = Path(directory)
    files = {"config.json": (_fields(directory / "config.json"), MODEL)}
    files["generation_config.json"] = _generation(directory), GENERATION
    found = {
        name: printable(", ".join(_left_unread(fields, rules)))
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
    """Reads sparse budgets from `sparse_attention_config.json` or inline from `config.json`.

    Returns None if the checkpoint has none or disables them. For the format see `head_budgets`.

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
    """Returns the number of voting queries per slice in `config.json`, even without budgets.

    Raises:
        ConfigError: if the file is missing or malformed.
    """
    path = Path(directory) / "config.json"
    return (_dual_chunk_fields(path, _fields(path)) or {}).get("sparse_attention_last_q", 64)


def head_budgets(
    layers: Any, where: Path | str, num_layers: int, num_heads: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Reads the budgets of every layer and head from JSON in the published format.

    That is a list with one object per layer, from the query head's index as a string to
    `["vertical_and_slash", vertical, slash, score]`.

    Args:
        layers: the parsed JSON.
        where: name of the file in errors.
        num_layers: layers of the model.
        num_heads: query heads of the model.

    Returns:
        Column and diagonal budgets, each `[layers][heads]`.

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
                    f"{printable(repr(row), 80)}"
                )
        vertical.append(tuple(layer[head][1] for head in heads))
        slash.append(tuple(layer[head][2] for head in heads))
    return tuple(vertical), tuple(slash)


def generation_config(directory: Path) -> GenerationConfig:
    """Reads sampling defaults from `generation_config.json`; EOS ids also from `config.json`.

    A checkpoint without the file gets greedy defaults and config.json's eos id.

    Raises:
        ConfigError: if a value is malformed or out of range, or a field is unknown or asks for
            a sampling method that is not implemented.
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


def _fields(path: Path) -> dict[str, Any]:
    """Reads the fields of a config.json and checks each by its rule.

    Raises:
        ConfigError: if a field breaks its rule, or the model is of another architecture.
    """
    raw = reading.read_object(path, limit=_JSON_BYTES, error=ConfigError)
    kind = raw.pop("model_type", None)
    if kind != "qwen2":
        meaning = _OTHER_MODELS.get(kind) if isinstance(kind, str) else None
        must = "is not 'qwen2', the only architecture built here (Qwen2 and Qwen2.5, dense, text)"
        must = f"{must}: that one {meaning}" if meaning else must
        raise _refusal(shown(path), "model_type", kind, must)
    return _checked(shown(path), raw, MODEL)


def _generation(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    if not os.path.lexists(path):
        return {}
    raw = reading.read_object(path, limit=_JSON_BYTES, error=ConfigError)
    return _checked(shown(path), raw, GENERATION)


def _check_tokens(path: Path, found: Mapping[str, Any], vocab_size: int) -> None:
    for field in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = found.get(field, [])
        if any(token >= vocab_size for token in _listed(value)):
            must = f"must be under vocab_size={vocab_size}"
            raise _refusal(shown(path), field, value, must)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _rope(path: Path, found: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    """Reads base and scaling of rotary embeddings, from either field name.

    Raises:
        ConfigError: if they contradict each other, or ask for an unknown scaling.
    """
    given = {}
    for field in ("rope_scaling", "rope_parameters"):
        raw = found.get(field) or {}
        kind = raw.get("rope_type") or raw.get("type") or "default"
        where = f"{shown(path)}: {field}"
        if kind not in ("default", "yarn"):
            raise ConfigError(
                f"{where} is of type {printable(repr(kind), 80)}: only 'yarn' and "
                "'default' are built here; remove it, and for long texts use Dual Chunk"
            )
        rules = YARN if kind == "yarn" else ROPE
        fields = _checked(where, raw, rules)
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
    """Reads the parameters of YaRN, with the defaults of transformers."""
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
    return _checked(where, raw, DUAL_CHUNK)


def _dual_chunk(path: Path, found: Mapping[str, Any]) -> tuple[ChunkGeometry | None, int]:
    """Reads the chunk sizes of DCA, and the training length of its temperature."""
    fields = _dual_chunk_fields(path, found)
    if fields is None:
        return None, 0
    try:
        geometry = ChunkGeometry(fields.get("chunk_size", 8192), fields.get("local_size", 1024))
    except ValueError as error:
        raise ConfigError(f"{shown(path)}: dual_chunk_attention_config: {error}") from None
    return geometry, fields.get("original_max_position_embeddings", 0)


def _is_budget(row: Any) -> bool:
    """Returns True if a row of a budgets file has the published form."""
    return (
        isinstance(row, list)
        and len(row) in (3, 4)
        and row[0] == "vertical_and_slash"
        and all(type(size) is int and 0 < size < 2**31 for size in row[1:3])
        and all(type(score) in (int, float) for score in row[3:])
    )


def _checked(where: str, raw: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Checks the fields of an object; returns those that are not null.

    Args:
        where: name of the object in errors: a file, or a field of one.

    Raises:
        ConfigError: naming a field that is unknown or has an invalid value.
    """
    unknown = sorted(raw.keys() - rules.keys())
    if unknown:
        raise ConfigError(
            f"{where} has fields this package does not know: {printable(', '.join(unknown))}; "
            "remove them if they do not change the model"
        )
    found = {name: value for name, value in raw.items() if value is not None}
    for name, value in found.items():
        if not rules[name].fits(value):
            raise _refusal(where, name, value, rules[name].must)
    return found


def _refusal(where: str, name: str, value: Any, must: str) -> ConfigError:
    """Builds the error about the value of a field."""
    return ConfigError(f"{where}: {name}={printable(repr(value), 80)} {must}")


def _left_unread(found: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """Returns present fields that are ignored and that published checkpoints do not have."""
    return [name for name in found if not rules[name].read and not rules[name].usual]
