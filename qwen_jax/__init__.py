"""Qwen2.5-1M inference in JAX."""

__version__ = "0.1.0"
