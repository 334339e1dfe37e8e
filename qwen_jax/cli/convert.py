"""The commands convert and export; `python -m convert` is the first of them."""

from convert.verbs import convert, export

__all__ = ["convert", "export"]
