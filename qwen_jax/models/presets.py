"""The published models: their names, and the shapes that their families know."""

import json
from pathlib import Path

from qwen_jax.config import ModelConfig
from qwen_jax.models.configs import model_config
from qwen_jax.models.families import FAMILIES, Published, family


def _published() -> dict[str, tuple[str, Published]]:
    """The family and the names of each published model, by key."""
    return {
        key: (model_type, names)
        for model_type, row in FAMILIES.items()
        for key, names in row.published.items()
    }


PUBLISHED = {key: names for key, (_, names) in _published().items()}
"""Names of the published models, by key."""
NAMES = tuple(names.name for names in PUBLISHED.values())
"""Short names of the published models, for users."""
HUB_IDS = {names.name: names.hub_id for names in PUBLISHED.values()}
"""Hub ids of the published models, by short name."""


def find(name: str) -> str | None:
    """The key of a published model that a short name or a hub id means; None for other text."""
    return next((key for key, (_, names) in _published().items() if name in names), None)


def write(directory: Path, key: str) -> Path:
    """Writes the config.json of a published model into a directory, created if missing.

    Args:
        name: a key of `SIZES`.

    Returns:
        The directory.
    """
    directory.mkdir(exist_ok=True)
    model_type, _ = _published()[key]
    (directory / "config.json").write_text(json.dumps(family(model_type).presets[key]))
    return directory


def config(directory: Path, key: str) -> ModelConfig:
    """Writes the config.json of a published model into a directory and reads it back."""
    return model_config(write(directory, key))
