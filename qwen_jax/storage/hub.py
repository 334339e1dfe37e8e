"""Directory of a checkpoint that a path means: itself, or a snapshot in a Hugging Face cache."""

import os
from pathlib import Path

from qwen_jax.config import ConfigError
from qwen_jax.files import reading
from qwen_jax.files.reading import printable, shown


def checkpoint(path: str | os.PathLike) -> Path:
    """The directory that holds a checkpoint's files.

    The cache directory of a repository (`models--Qwen--X`) or its `snapshots` stand for the
    snapshot that its `refs/main` names, or for its only one. Any other directory stands for
    itself, whatever it lacks.

    Raises:
        ConfigError: if a cache has several snapshots and does not name one, or there is another
            kind of model at the path: an adapter, or files of llama.cpp.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        raise ConfigError(_gguf(path))
    names = _names(path)
    if "adapter_config.json" in names:
        raise ConfigError(_adapter(path))
    if names & {"config.json", "manifest.json"}:
        return path
    if path.name == "snapshots" and path.parent.name.startswith("models--"):
        return checkpoint(path.parent)
    if "snapshots" in names:
        return checkpoint(_snapshot(path))
    models = sorted(name for name in names if name.startswith("models--"))
    if models:
        raise ConfigError(
            f"{shown(path)} is a cache of several models: give one of them, such as "
            f"{shown(path / models[0])}"
        )
    if any(name.endswith(".gguf") for name in names):
        raise ConfigError(_gguf(path))
    return path


def _names(path: Path) -> set[str]:
    """What lies in a directory; nothing where it cannot be read, which its readers say."""
    try:
        return set(os.listdir(path))
    except (OSError, ValueError):
        return set()


def _snapshot(repository: Path) -> Path:
    snapshots = repository / "snapshots"
    found = sorted(name for name in _names(snapshots) if (snapshots / name).is_dir())
    main = repository / "refs" / "main"
    if os.path.lexists(main):
        revision = reading.read_text(main, limit=1 << 10, error=ConfigError).strip()
        if revision in found:
            return snapshots / revision
    elif len(found) == 1:
        return snapshots / found[0]
    if not found:
        raise ConfigError(f"{shown(snapshots)} is empty: download the model again")
    raise ConfigError(
        f"{shown(repository)} has no refs/main that names one of its snapshots: give one of "
        f"them, {', '.join(shown(snapshots / name) for name in found[:5])}"
    )


def _adapter(path: Path) -> str:
    file = path / "adapter_config.json"
    raw = reading.read_object(file, limit=1 << 20, error=ConfigError)
    base = raw.get("base_model_name_or_path")
    base = f" {printable(base)}" if isinstance(base, str) else ""
    return (
        f"{shown(path)} holds an adapter (LoRA) of the model{base}, not a model: merge both "
        "first, in Python with peft: AutoPeftModelForCausalLM.from_pretrained(DIRECTORY)"
        ".merge_and_unload().save_pretrained(MERGED), and give MERGED"
    )


def _gguf(path: Path) -> str:
    return (
        f"{shown(path)} holds a model for llama.cpp (GGUF), which is not read here: get the "
        "Hugging Face directory with config.json and safetensors files"
    )
