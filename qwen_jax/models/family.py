"""The type of an entry of the registry of model families."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qwen_jax.config import ModelConfig
from qwen_jax.hf_config import Rule, decoder_config
from qwen_jax.models.decoder import Decoder


class Place(NamedTuple):
    """Destination of a tensor of a Hugging Face checkpoint.

    Attributes:
        path: keys that lead to its array in the parameter tree, joined by dots; a matrix whose
            path ends with `kernel` is transposed, from `[out, in]`, before it is reshaped.
        source_shape: shape of the tensor.
        shape: shape of the array, a layer's without the layer axis.
    """

    path: str
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models that one module computes.

    Attributes:
        rules: values that each field of config.json may have, but for `model_type`.
        config: makes the configuration of the fields that are there and not null:
            `config(path, model_type, fields)`; raises ConfigError.
        module: the decoder, made as `module(config, key=..., dtype=..., skip_attention=...)`.
        tensors: from a Hugging Face name to its place; `{layer}` in a name is the layer's number.
            The head is listed for tied models too, which have no array for it.
        presets: config.json of each published model.
    """

    rules: Mapping[str, Rule]
    module: type[Decoder]
    tensors: Callable[[ModelConfig], dict[str, Place]]
    config: Callable[[Path, str, Mapping[str, Any]], ModelConfig] = decoder_config
    presets: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
