"""Where things are kept that can be made again: under the user's cache directory."""

import os
from pathlib import Path


def directory(name: str) -> Path | None:
    """The directory `name` of this program under the user's cache directory, made if missing.

    That is `$XDG_CACHE_HOME/qwen-jax/NAME`, else `~/.cache/qwen-jax/NAME`. What is made is
    readable by its owner alone (mode 0700).

    Returns:
        None if there is no home or nothing can be written there: callers do without.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME")
        root = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
        path = root / "qwen-jax" / name
        root.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        usable = os.access(path, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    return path if usable else None
