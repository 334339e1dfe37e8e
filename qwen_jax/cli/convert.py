"""The commands convert and export; `python -m convert` is the first of them, in one process."""

from convert.verbs import convert as convert_alone
from convert.verbs import export
from qwen_jax.cli.on_hosts import expand_on_hosts

convert = expand_on_hosts(convert_alone, devices=False)

__all__ = ["convert", "export"]
