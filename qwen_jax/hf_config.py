"""Hugging Face's JSON files: what each field may hold, and what it means.

A field that is null counts as absent, as in transformers.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import ConfigError, ModelConfig, Yarn
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


def architecture(name: str) -> Rule:
    """The class of transformers that a checkpoint is for."""
    return Rule(
        lambda value: isinstance(value, list) and name in value,
        f'must be ["{name}"], the only architecture of this model_type built here',
    )


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

DECODER = {
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
    **_rules(off(False), "use_mrope use_dynamic_ntk use_logn_attn mlp_bias"),
    **_rules(off(False), "is_encoder_decoder tie_encoder_decoder add_cross_attention"),
    **_rules(off(True), "is_causal"),
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
"""config.json of a dense decoder, but for `model_type` and what its family says."""

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
    "rope_theta": DECODER["rope_theta"],
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


def read_object(path: Path) -> dict[str, Any]:
    """The fields of a JSON file that holds an object.

    Raises:
        ConfigError: if it is missing, no regular file or not valid JSON.
    """
    return reading.read_object(path, limit=_JSON_BYTES, error=ConfigError)


def decoder_config(path: Path, model_type: str, found: Mapping[str, Any]) -> ModelConfig:
    """A dense decoder.

    Args:
        path: of config.json.
        model_type: that it names.
        found: its other fields, each of which meets its rule.

    Raises:
        ConfigError: if a field is missing or contradicts another.
    """
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
    check_tokens(path, found, found["vocab_size"])
    rope_theta, yarn = _rope(path, found)
    geometry, original_len = _dual_chunk(path, found)
    try:
        return ModelConfig(
            model_type=model_type,
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


def check_tokens(path: Path, found: Mapping[str, Any], vocab_size: int) -> None:
    """Raise ConfigError if a token id of a file is not in the vocabulary."""
    for field in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = found.get(field, [])
        if any(token >= vocab_size for token in listed(value)):
            must = f"must be under vocab_size={vocab_size}"
            raise _refusal(shown(path), field, value, must)


def listed(value: Any) -> list[Any]:
    """The token ids of a field that may hold one of them or a list."""
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
        fields = checked(where, raw, rules)
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


def dual_chunk_fields(path: Path, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The object `dual_chunk_attention_config` of config.json, by its rules; None without one.

    Raises:
        ConfigError: naming a field that is unknown or has a wrong value.
    """
    raw = found.get("dual_chunk_attention_config")
    if raw is None:
        return None
    where = f"{shown(path)}: dual_chunk_attention_config"
    return checked(where, raw, DUAL_CHUNK)


def _dual_chunk(path: Path, found: Mapping[str, Any]) -> tuple[ChunkGeometry | None, int]:
    """Reads the chunk sizes of DCA, and the training length of its temperature."""
    fields = dual_chunk_fields(path, found)
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


def checked(where: str, raw: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
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


def left_unread(found: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """Returns present fields that are ignored and that published checkpoints do not have."""
    return [name for name in found if not rules[name].read and not rules[name].usual]
