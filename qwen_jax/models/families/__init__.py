"""The registry of model families, by the `model_type` of config.json.

A family is a module of this package with a `FAMILY` (`qwen_jax.models.family.Family`) and a row
of `FAMILIES`. The module needs jax, so it is imported when a model of it is read, not before.
"""

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_jax.config import ConfigError
from qwen_jax.files.reading import printable

if TYPE_CHECKING:
    from qwen_jax.models.family import Family


class Published(NamedTuple):
    """Names of a published model.

    Attributes:
        name: short name, for users.
        hub_id: id in the Hugging Face hub.
    """

    name: str
    hub_id: str


class Row(NamedTuple):
    """A row of the registry.

    Attributes:
        module: name of the module that defines `FAMILY`.
        models: description of the models, for errors.
        published: names of published models, by keys of `Family.presets`.
    """

    module: str
    models: str
    published: dict[str, Published] = {}  # noqa: RUF012


FAMILIES = {
    "qwen2": Row(
        "qwen_jax.models.families.qwen2",
        "Qwen2 and Qwen2.5, dense, text",
        {
            "7b": Published("7b-1m", "Qwen/Qwen2.5-7B-Instruct-1M"),
            "14b": Published("14b-1m", "Qwen/Qwen2.5-14B-Instruct-1M"),
        },
    ),
}
"""Every family, by `model_type`."""

# What other values of `model_type` mean.
_OTHERS = {
    "qwen2_vl": "reads pictures",
    "qwen2_5_vl": "reads pictures",
    "qwen2_audio": "reads sound",
    "qwen2_5_omni": "reads sound and pictures",
    "qwen2_moe": "is a mixture of experts",
    "qwen3": "normalizes queries and keys",
    "qwen3_moe": "is a mixture of experts",
}


def family(model_type: Any, where: str = "") -> "Family":
    """Returns the family of a `model_type`.

    Args:
        where: beginning of the error: the file that says it.

    Raises:
        ConfigError: naming the families that there are.
    """
    row = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if row is None:
        known = " or ".join(f"{name!r} ({each.models})" for name, each in FAMILIES.items())
        text = f"{where}model_type={printable(repr(model_type), 80)} is not {known}: "
        meaning = _OTHERS.get(model_type) if isinstance(model_type, str) else None
        raise ConfigError(f"{text}{f'that one {meaning}' if meaning else 'nothing else is built'}")
    return importlib.import_module(row.module).FAMILY
