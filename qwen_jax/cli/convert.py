"""The commands convert and export; `python -m convert` is the first of them, in one process."""

from convert.verbs import convert_with, export
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.distributed import multihost

convert = expand_on_hosts(convert_with(multihost), devices=False)

__all__ = ["convert", "export"]
