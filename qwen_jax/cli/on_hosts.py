"""Flags of verbs that run on several hosts, and the settings that must agree on all."""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from qwen_jax.cli.flags import adding, expand, note, option
from qwen_jax.distributed import multihost
from qwen_jax.llm.options import Within
from qwen_jax.storage import hub
from qwen_jax.storage.manifest import READ_FILES, file_sums

_FILES = (*READ_FILES, "manifest.json")
_PACKAGES = ("qwen_jax", "pallas_kernels", "convert")
_MODELS = ("model", "src", "path")  # arguments that name one
_OWN = ("coordinator", "process_id")  # flags that differ between processes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostFlags:
    """Flags of every verb that runs on several hosts; None means what the environment says."""

    section: ClassVar[str] = "Hosts"

    coordinator: Annotated[
        str | None,
        option("Where process 0 listens for the others of a job.", metavar="HOST:PORT"),
    ] = None
    num_processes: Annotated[
        int | None, option("Processes of the job, each of which runs this command."), Within(1)
    ] = None
    process_id: Annotated[int | None, option("Number of this process, from 0."), Within(0)] = None
    heartbeat: Annotated[
        int, typer.Option(help="Seconds after which a silent process is taken for dead."), Within(1)
    ] = 15
    init_timeout: Annotated[
        int, typer.Option(help="Seconds to wait for all processes of a job."), Within(1)
    ] = 300


def expand_on_hosts(verb: Callable, *, devices: bool = True) -> Callable:
    """Wraps a verb as `expand`, for several processes that run it in lock-step.

    Args:
        devices: see `multihost.start`.
    """

    @adding(verb, "host_flags", HostFlags)
    def started(host_flags: HostFlags, **given):
        place = multihost.find(
            host_flags.coordinator,
            host_flags.num_processes,
            host_flags.process_id,
            host_flags.init_timeout,
        )
        multihost.start(
            place,
            lambda: facts(verb.__name__, {"hosts": host_flags, **given}, whole=devices),
            heartbeat=host_flags.heartbeat,
            timeout=host_flags.init_timeout,
            devices=devices,
        )
        return verb(**given)

    return expand(started)


def facts(verb: str, given: Mapping[str, Any], *, whole: bool = True) -> dict[str, str]:
    """Returns the settings that must agree in all processes of a job, by names that users know.

    Paths may differ: models and budgets are compared by content, and other files are read by
    process 0 only.

    Args:
        verb: name of the verb.
        given: the verb's arguments, single or in dataclasses.
        whole: compare every byte of weights; otherwise headers and samples of unconverted ones,
            for verbs that read them on one file system.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the weights are damaged.
        ConfigError: if config.json cannot be used.
    """
    from convert import source
    from qwen_jax.llm import sessions
    from qwen_jax.models import params

    found = {
        "the code of qwen-jax": _code(),
        "the version of jax": importlib.metadata.version("jax"),
        "the verb": verb,
    }
    for name, value in given.items():
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        else:
            fields = {name: value}
        for field, each in fields.items():
            flag = "--" + field.replace("_", "-")
            if field == "sparse_config" and each is not None:
                found[flag] = file_sums(each).sha256[:16]
            elif field not in _OWN and not _names_paths(each):
                found[flag] = str(each).encode("utf-8", "backslashreplace").decode()
    model = next((given[name] for name in _MODELS if given.get(name) is not None), None)
    if model is not None:
        model = hub.checkpoint(model)
        found |= {
            name: file_sums(model / name).sha256[:16] for name in _FILES if (model / name).is_file()
        }
        unread = bool(given.get("random_weights") or given.get("allow_pickle_weights"))
        if not unread and not params.is_converted(model) and model.is_dir():
            known = (
                sessions.weights_fingerprint(model, note)
                if whole
                else source.check(model).outline()
            )
            found["the weights"] = known[:16]
    return found


def _code() -> str:
    """Returns a checksum of the Python files of this program's packages."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _names_paths(value: Any) -> bool:
    several = isinstance(value, list | tuple) and bool(value)
    return all(isinstance(each, Path) for each in (value if several else [value]))
