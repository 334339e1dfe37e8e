"""Sandbox: runs a function on foreign programs (templates, patterns) in a limited child process."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen_jax.files import reading, user_cache

MEMORY_BYTES = 1 << 30
"""Address space of the child in bytes."""
ANSWER_BYTES = 1 << 20
"""Maximum size of an answer as JSON, in bytes."""

_CHILD = """
import importlib.util, json, resource, sys
request = json.loads(sys.stdin.buffer.read())
for name, value in request["limits"].items():
    ceiling = resource.getrlimit(getattr(resource, name))[1]
    value = value if ceiling < 0 else min(value, ceiling)
    resource.setrlimit(getattr(resource, name), (value, value))
sys.path[:] = request["path"]
spec = importlib.util.spec_from_file_location("probe", request["program"])
probe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(probe)
probe.prepare()
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
sys.stdout.buffer.write(json.dumps(probe.answer(**request["arguments"])).encode())
"""


class ProbeError(ValueError):
    """Error of a child that ended without an answer."""


def answer(
    program: ModuleType, arguments: dict[str, Any], *, library: str, cpu_seconds: int, cache: str
) -> Any:
    """Returns the result of `program.answer(**arguments)`, run in a limited child process.

    The child has `MEMORY_BYTES` of address space, limited CPU time and, after
    `program.prepare()`, no files. Results are cached in the user's cache directory, if there
    is one.

    Args:
        program: a module that imports nothing of this package, since it is run from its file.
        arguments: arguments of `answer`, as JSON.
        library: package under test, whose version is part of the cache key.
        cpu_seconds: limit of CPU time in seconds.
        cache: name of the directory in the cache.

    Raises:
        ProbeError: if there is no answer within the limits.
    """
    path = Path(program.__file__ or "")
    versions = [path.read_text("utf-8"), _CHILD, metadata.version(library), sys.version]
    key = hashlib.sha256(json.dumps([arguments, versions]).encode()).hexdigest()
    directory = user_cache.directory(cache)
    kept = None if directory is None else directory / f"{key}.json"
    if kept is not None and kept.exists():
        try:
            return reading.read_json(kept, limit=ANSWER_BYTES)
        except reading.FileError:
            pass  # damaged: it is made again
    found = _run(path, arguments, cpu_seconds)
    if kept is not None:
        _keep(kept, found)
    return found


def _run(program: Path, arguments: dict[str, Any], cpu_seconds: int) -> Any:
    limits = {
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
    }
    request = {
        "arguments": arguments,
        "limits": limits,
        "path": [str(each) for each in sys.path],
        "program": str(program.absolute()),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-X", "utf8", "-c", _CHILD],
            input=json.dumps(request).encode(),
            # Threads would take address space, and more of it on larger machines.
            env={**os.environ, "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20 * cpu_seconds,
            check=False,
        )
    except (OSError, ValueError) as error:
        raise ProbeError(f"no process to try it in: {reading.reason(error)}") from None
    except subprocess.TimeoutExpired:
        raise ProbeError(f"trying it takes more than {20 * cpu_seconds} s") from None
    if done.returncode or len(done.stdout) > ANSWER_BYTES:
        raise ProbeError(
            f"trying it takes more than {cpu_seconds} s or {MEMORY_BYTES >> 20:,} MiB, or ends in "
            f"an accident (exit code {done.returncode})"
        )
    try:
        return reading.parse_json(done.stdout)
    except ValueError as error:
        raise ProbeError(f"trying it says no JSON: {error}") from None


def _keep(path: Path, found: Any) -> None:
    """Writes an answer atomically; ignores a cache that cannot be written."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(found, file)
        os.replace(file.name, path)
    except OSError:
        pass
