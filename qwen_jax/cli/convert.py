"""The commands convert and export; `python -m convert` is the first of them, in one process."""

from convert import verbs
from convert.verbs import export
from qwen_jax.cli.on_hosts import expand_on_hosts

convert = expand_on_hosts(verbs.convert, devices=False)

__all__ = ["convert", "export"]
