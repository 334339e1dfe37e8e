"""Configurations read from the JSON files of a checkpoint, by the family that config.json names."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_jax import hf_config
from qwen_jax.config import ConfigError, GenerationConfig, ModelConfig, SparseConfig
from qwen_jax.files.reading import printable, shown
from qwen_jax.models.families import family

if TYPE_CHECKING:
    from qwen_jax.models.family import Family


def model_config(directory: Path) -> ModelConfig:
    """The model that `directory/config.json` describes.

    Raises:
        ConfigError: if the file is missing, or a field is missing, unknown,
            contradictory or asks for something this package does not compute.
    """
    path = Path(directory) / "config.json"
    model_type, of, found = _opened(path)
    return of.config(path, model_type, found)


def notes(directory: Path) -> list[str]:
    """Sentences for the user about fields that are left unread, a file each.

    Raises:
        ConfigError: if a file cannot be used.
    """
    directory = Path(directory)
    _, of, fields = _opened(directory / "config.json")
    files = {"config.json": (fields, of.rules)}
    files["generation_config.json"] = _generation(directory), hf_config.GENERATION
    found = {
        name: printable(", ".join(hf_config.left_unread(fields, rules)))
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

    None if the checkpoint has none or disables them. For the format see `hf_config.head_budgets`.

    Args:
        file: budgets to read instead of the checkpoint's own, which may be disabled.

    Raises:
        ConfigError: if the budgets do not fit the model or are malformed.
    """
    main = Path(directory) / "config.json"
    path = Path(directory) / "sparse_attention_config.json"
    fields = hf_config.dual_chunk_fields(main, _opened(main)[2]) or {}
    threshold = fields.get("sparse_attention_threshold", 32768)
    last_q = fields.get("sparse_attention_last_q", 64)
    inline = fields.get("sparse_attention_config")
    side = hf_config.read_json(path) if file is None and os.path.lexists(path) else None
    if file is not None:
        layers, where = hf_config.read_json(file), shown(file)
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
    vertical, slash = hf_config.head_budgets(layers, where, model.num_layers, model.num_heads)
    return SparseConfig(vertical=vertical, slash=slash, threshold=threshold, last_q=last_q)


def last_q(directory: Path) -> int:
    """Queries of a slice that vote by `config.json`, whether there are budgets or not.

    Raises:
        ConfigError: if the file is missing or malformed.
    """
    path = Path(directory) / "config.json"
    return (hf_config.dual_chunk_fields(path, _opened(path)[2]) or {}).get(
        "sparse_attention_last_q", 64
    )


def generation_config(directory: Path) -> GenerationConfig:
    """Sampling defaults from `generation_config.json`; eos ids also from `config.json`.

    A checkpoint without the file gets greedy defaults and config.json's eos id.

    Raises:
        ConfigError: if a value is malformed or out of range, or a field is unknown or asks for
            a way of sampling that is not built here.
    """
    directory = Path(directory)
    found, model = _generation(directory), _opened(directory / "config.json")[2]
    if "vocab_size" in model:
        hf_config.check_tokens(directory / "generation_config.json", found, model["vocab_size"])
    eos = (hf_config.listed(fields.get("eos_token_id", [])) for fields in (found, model))
    return GenerationConfig(
        eos_ids=tuple(dict.fromkeys(token for ids in eos for token in ids)),
        do_sample=found.get("do_sample", False),
        temperature=float(found.get("temperature", 1.0)),
        top_k=found.get("top_k", 0),
        top_p=float(found.get("top_p", 1.0)),
        min_p=float(found.get("min_p", 0.0)),
        repetition_penalty=float(found.get("repetition_penalty", 1.0)),
    )


def _opened(path: Path) -> tuple[str, "Family", dict[str, Any]]:
    """Returns `model_type` of a config.json, its family, and the other fields, checked.

    Raises:
        ConfigError: also if it is the configuration of another kind of model.
    """
    raw = hf_config.read_object(path)
    model_type = raw.pop("model_type", None)
    found = family(model_type, f"{shown(path)}: ")
    return model_type, found, hf_config.checked(shown(path), raw, found.rules)


def _generation(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    if not os.path.lexists(path):
        return {}
    raw = hf_config.read_object(path)
    return hf_config.checked(shown(path), raw, hf_config.GENERATION)
