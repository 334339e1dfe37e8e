"""Qwen2.5-1M inference in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_jax.config import ConfigError
    from qwen_jax.engine.engine import Engine
    from qwen_jax.engine.layout import EngineConfig
    from qwen_jax.engine.request import EngineError, Request, RequestError, Sampling
    from qwen_jax.llm.async_llm import AsyncLLM
    from qwen_jax.llm.documents import DocumentError
    from qwen_jax.llm.llm import LLM
    from qwen_jax.storage.errors import CheckpointError
    from qwen_jax.storage.kv_session import SessionError
    from qwen_jax.text.tokenizer_file import TokenizerError

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CheckpointError",
    "ConfigError",
    "DocumentError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "Request",
    "RequestError",
    "Sampling",
    "SessionError",
    "TokenizerError",
    "__version__",
]

_HOMES = {
    "LLM": "llm.llm",
    "AsyncLLM": "llm.async_llm",
    "Engine": "engine.engine",
    "EngineConfig": "engine.layout",
    "Request": "engine.request",
    "Sampling": "engine.request",
    "CheckpointError": "storage.errors",
    "ConfigError": "config",
    "DocumentError": "llm.documents",
    "EngineError": "engine.request",
    "RequestError": "engine.request",
    "SessionError": "storage.kv_session",
    "TokenizerError": "text.tokenizer_file",
}


def __getattr__(name: str) -> Any:
    """Imports a public name, and JAX with it where it is needed, on first access."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
