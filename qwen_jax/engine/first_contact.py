"""First contact: compares kernels with XLA once on each kind of device that they run on.

A kernel that computes other numbers there, or fails, is refused, never replaced. An agreement is
stored under the user's cache directory, for the same device, versions, shapes and source; a
disagreement is never stored, so that a cause outside the kernel, such as memory that another
program held, affects one start only. Every process of a job compares on its own device.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pallas_kernels import check
from pallas_kernels.check import Result, Shape
from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.backend import Unsupported
from qwen_jax.config import ConfigError
from qwen_jax.files import reading, user_cache
from qwen_jax.storage import atomic, manifest

TRUSTED = ("xla", "reference")
"""Backends that others are compared with, and which are not checked themselves."""
PACKAGES = (
    "jax jaxlib libtpu jax-triton triton jax-cuda12-plugin jax-cuda12-pjrt jax-cuda13-plugin "
    "jax-cuda13-pjrt nvidia-cuda-nvcc-cu12 nvidia-cuda-nvcc nvidia-cudnn-cu12 nvidia-cudnn-cu13"
).split()
"""Packages whose versions decide what a kernel is compiled to."""
_FLAGS = "XLA_FLAGS", "LIBTPU_INIT_ARGS"
_DRIVER = Path("/proc/driver/nvidia/version")
_FORMAT = "qwen-jax checked kernels 1"
MAX_BYTES = 1 << 20
agreed_here: set[str] = set()
"""Names of what agreed in this process, for where nothing can be kept."""


def ensure(
    shape: Shape,
    chosen: Mapping[str, str],
    device: Any,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Compares the backends that have not been compared on this kind of device yet.

    Args:
        shape: sizes and dtype of the model's attention on one device.
        chosen: backend of each program of `programs.PROGRAMS` that will run.
        device: a JAX device of this process.
        say: called with a line of text before a comparison starts.

    Raises:
        Unsupported: if a kernel cannot take the shape.
        ConfigError: if a kernel differs from XLA or fails, with the figures and alternatives.
    """
    chosen = unproven(chosen)
    if not chosen:
        return
    key = key_of(shape, chosen, device)
    if known(key):
        return
    names = ", ".join(dict.fromkeys(chosen.values()))
    say(f"{names}: comparing with xla on {reading.printable(device.device_kind)}, once")
    results = []
    for result in compare(shape, chosen, device):
        refuse(result, device)
        results.append(result)
    keep(key, results)


def unproven(chosen: Mapping[str, str]) -> dict[str, str]:
    """Returns the programs, with their backends, whose kernels have to be compared."""
    return {
        name: who for name, who in chosen.items() if who in backend.NAMES and who not in TRUSTED
    }


def compare(shape: Shape, chosen: Mapping[str, str], device: Any) -> Iterable[Result]:
    """Compares each program's backend with XLA, whether it was compared before or not."""
    for who in dict.fromkeys(chosen.values()):
        programs = tuple(name for name in chosen if chosen[name] == who)
        yield from check.check(shape, who, programs=programs, device=device)


def refuse(result: Result, device: Any) -> None:
    """Raises an error if a result does not agree.

    Raises:
        Unsupported: if the kernel refuses the shape.
        ConfigError: if it differs or fails, naming other kernels to choose.
    """
    if result.verdict == "agrees":
        return
    if result.verdict == "refuses":
        raise Unsupported(result.reason)
    ways = [f"--kernels {name}" for name in others(result.backend, device)]
    raise ConfigError(
        f"{result.program} by {result.backend} {result.verdict} on {device.device_kind}: "
        f"{reading.printable(result.reason, 400)}; choose other kernels ({', '.join(ways)}), and "
        "report it with qwen-jax doctor --kernels --report FILE"
    )


def others(name: str, device: Any) -> list[str]:
    """Returns the other backends available on a device, best first."""
    return [
        each
        for each in backend.PREFERRED[device.platform]
        if each != name and backend.unavailable(each, kind=device.device_kind) is None
    ]


def key_of(shape: Shape, chosen: Mapping[str, str], device: Any) -> dict[str, Any]:
    """Returns everything that a result depends on, as a JSON object."""
    flags = repr([os.environ.get(name) for name in _FLAGS]).encode()
    key = {
        "device": [device.platform, device.device_kind],
        "versions": versions(device),
        "flags": hashlib.sha256(flags).hexdigest(),  # they may name paths
        "shape": dataclasses.asdict(shape),
        "kernels": dict(sorted(chosen.items())),
        "source": check.source(),
    }
    return json.loads(json.dumps(key))


def versions(device: Any) -> dict[str, str | None]:
    """Returns the versions of `PACKAGES`, of the device's platform and of NVIDIA's driver.

    None stands for what is not installed.
    """
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["platform"] = reading.printable(device.client.platform_version)
    found["driver"] = None
    with contextlib.suppress(OSError):
        found["driver"] = reading.printable(_DRIVER.read_text().partition("\n")[0])
    return found


def known(key: dict[str, Any]) -> bool:
    """Returns True if this key agreed before: in this process, or by an intact file."""
    if _name(key) in agreed_here:
        return True
    directory = user_cache.directory("kernels")
    if directory is None:
        return False
    try:
        content = reading.read_bytes(directory / _name(key), limit=MAX_BYTES)
        return content == _sealed(key, reading.parse_json(content)["results"])
    except (ValueError, TypeError, KeyError):  # missing or damaged: compared again
        return False


def keep(key: dict[str, Any], results: Iterable[Result]) -> None:
    """Stores that a key's results agree, or deletes an earlier agreement if they do not."""
    rows = [dataclasses.asdict(each) for each in results]
    directory = user_cache.directory("kernels")
    path = None if directory is None else directory / _name(key)
    agreed = all(row["verdict"] == "agrees" for row in rows)
    (agreed_here.add if agreed else agreed_here.discard)(_name(key))
    if path is not None:
        with contextlib.suppress(OSError):  # what cannot be kept is compared again
            atomic.write(path, _sealed(key, rows)) if agreed else path.unlink(missing_ok=True)


def _name(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32] + ".json"


def _sealed(key: dict[str, Any], rows: list[dict[str, Any]]) -> bytes:
    return manifest.seal(_FORMAT, {"key": key, "results": rows})
