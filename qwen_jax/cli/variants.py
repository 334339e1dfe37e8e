"""Variants of one checkpoint's settings, to compare with each other."""

import dataclasses

from qwen_jax.cli.flags import not_one_of
from qwen_jax.config import ConfigError
from qwen_jax.llm.model import Model

NAMES = ("rope", "dca", "sparse")


def models(opened: Model, names: list[str]) -> dict[str | None, Model]:
    """Returns a checkpoint with the settings of each variant, or unchanged under None.

    "rope" is without Dual Chunk Attention, "dca" with it, "sparse" with it and with
    sparse prefill of every prompt.

    Args:
        opened: the opened checkpoint.
        names: names of variants; [] for the checkpoint as opened.

    Raises:
        ConfigError: if a variant is unknown or named twice, or the checkpoint does not support it.
    """
    if not names:
        return {None: opened}
    for name in names:
        if name not in NAMES:
            raise ConfigError(not_one_of("--compare", name, NAMES))
    if len(set(names)) != len(names):
        raise ConfigError(f"--compare {','.join(names)} names one twice")
    for flag, value in (("--dca", opened.options.dca), ("--sparse", opened.options.sparse)):
        if value == "off":
            raise ConfigError(f"{flag} off contradicts --compare, which chooses for each column")
    if opened.config.dual_chunk is None and set(names) != {"rope"}:
        raise ConfigError(
            f"--compare {','.join(names)}: {opened.directory / 'config.json'} has no Dual Chunk "
            "sizes; add --dca on --dca-chunk N --dca-local N"
        )
    if opened.sparse is None and "sparse" in names:
        raise ConfigError(
            f"--compare sparse: {opened.directory} has no budgets (sparse_attention_config.json), "
            "or config.json disables them; give --sparse-config FILE"
        )
    return {name: _variant(opened, name) for name in names}


def _variant(opened: Model, name: str) -> Model:
    config, sparse = opened.config, None
    if name == "rope":
        config = dataclasses.replace(config, dual_chunk=None, original_len=0)
    if name == "sparse" and opened.sparse is not None:
        sparse = dataclasses.replace(opened.sparse, threshold=0)
    return dataclasses.replace(opened, config=config, sparse=sparse)
