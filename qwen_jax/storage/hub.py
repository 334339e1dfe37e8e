"""Resolution of paths and hub ids to checkpoint directories, without the network."""

import os
import re
from pathlib import Path

from qwen_jax.config import ConfigError
from qwen_jax.files import reading
from qwen_jax.files.reading import printable, shown

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@(\w[\w./-]*))?", re.ASCII)


def checkpoint(path: str | os.PathLike) -> Path:
    """Resolves a path or hub id to the directory that holds a checkpoint's files.

    A hub id (`Qwen/X`, or `Qwen/X@REVISION`) that is no local path resolves to its snapshot in the
    local hub cache. The cache directory of a repository (`models--Qwen--X`) or its `snapshots`
    resolve to the snapshot that its `refs/main` names, or to its only one. Any other directory
    resolves to itself, even if files are missing.

    Raises:
        ConfigError: if a hub id is not in the cache, a cache has several snapshots and does not
            name one, or there is another kind of model at the path: an adapter, or files of
            llama.cpp.
    """
    path = Path(path)
    hub_id = split_id(os.fspath(path))
    if hub_id is not None and not os.path.lexists(path):
        return checkpoint(_cached(*hub_id))
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


def split_id(name: str) -> tuple[str, str | None] | None:
    """Splits `Qwen/X@REVISION` into id and revision (None if left out); None if no hub id."""
    found = _ID.fullmatch(name)
    return None if found is None or ".." in name or "--" in name else (found[1], found[2])


def is_local(path: str | os.PathLike) -> bool:
    """Returns True for an existing path, or a hub id with a snapshot in the local cache."""
    hub_id = split_id(os.fspath(path))
    in_cache = hub_id is not None and _names(_repository(hub_id[0]) / "snapshots")
    return bool(in_cache) or os.path.lexists(path)


def cache() -> Path:
    """Returns the directory of the local hub cache: HF_HUB_CACHE, else `hub` under HF_HOME."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(base, "huggingface")
    return Path(os.path.expanduser(os.path.expandvars(given or os.path.join(home, "hub"))))


def _repository(name: str) -> Path:
    """Returns the directory of a hub id's repository in the cache, which may not exist."""
    return cache() / f"models--{name.replace('/', '--')}"


def _cached(name: str, revision: str | None) -> Path:
    """Returns a repository in the hub cache, or the snapshot of a revision.

    Raises:
        ConfigError: if it is not in the cache, with the command that downloads it.
    """
    repository = _repository(name)
    command = f"qwen-jax download {name}" + (f" --revision {revision}" if revision else "")
    if not _names(repository / "snapshots"):
        raise ConfigError(
            f"{name}: there is no such model, neither a directory here nor a snapshot in "
            f"{shown(cache())}; fetch it with: {command}"
        )
    if revision is None:
        return repository
    ref = repository / "refs" / revision
    commit = reading.read_text(ref, limit=1 << 10, error=ConfigError) if ref.is_file() else revision
    if commit.strip() not in _names(repository / "snapshots"):
        raise ConfigError(
            f"{name} has no snapshot of revision {revision} in {shown(cache())}; fetch it with: "
            f"{command}"
        )
    return repository / "snapshots" / commit.strip()


def _names(path: Path) -> set[str]:
    """Returns the names in a directory; empty if it cannot be read."""
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
