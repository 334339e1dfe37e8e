"""A job: one command on every host of a topology, and the values that schedulers ask for."""

import dataclasses
import os
import re
import shlex
from pathlib import Path

import yaml

from qwen_jax.config import ConfigError
from qwen_jax.files.reading import shown
from qwen_jax.jobs import accelerators
from qwen_jax.planner.devices import Topology
from qwen_jax.storage import atomic

FORMAT = "qwen-jax job 1"
"""In every file of a job, by which it is known to be ours and may be overwritten."""

PORT = 8476
"""Of jax's coordinator. Google's firewall opens it between the hosts of a slice, but not the 8482
that jax takes by itself (github.com/jax-ml/jax/issues/35905)."""
DASHBOARD = "http://127.0.0.1:8265"
"""Where Ray takes jobs if nothing else is said, through a tunnel or on its head."""

_LABEL = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", "lower-case letters, digits and hyphens (DNS-1123)"
_WORD = r"[A-Za-z0-9][\w.,-]*", "letters, digits, dots, commas and hyphens"
_PATH = r"/[^:\x00-\x1f\x7f]*", "an absolute path without colons and control characters"
# Field -> what it must match as a whole, and how that is said.
_PATTERNS = {
    # A pod is called after it, with the numbers of job and pod and five letters, in 63.
    "name": (r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", f"at most 40 {_LABEL[1]}, a letter first"),
    "image": (r"[A-Za-z0-9][\w./:@-]*", "a reference such as europe-docker.pkg.dev/p/r/qwen-jax:1"),
    "project": (r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]", "the id of a project"),
    "zone": (r"[a-z]+-[a-z]+\d+-[a-z0-9]+", "a zone such as us-west4-a"),
    "cluster": _LABEL,
    "namespace": _LABEL,
    "service_account": (r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", _LABEL[1]),
    "claim": (r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", _LABEL[1]),
    "bucket": (r"[a-z0-9][-\w.]{1,220}[a-z0-9]", "the name of a bucket, without gs://"),
    "storage": _LABEL,
    "mount": _PATH,
    "compile_cache": _PATH,
    "runtime_version": _WORD,
    "partition": _WORD,
    "account": _WORD,
    "time": (
        r"\d+(:\d\d){0,2}|\d+-\d\d?(:\d\d){0,2}",
        "minutes, hours:minutes:seconds or days-hours",
    ),
    "address": (r"https?://[\w.\[\]:/-]+", "a URL such as http://127.0.0.1:8265"),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where and how a job runs.

    Attributes:
        name: of the job, and of what is made for it.
        max_restarts: after other failures than exit code 75.
        grace: seconds from SIGTERM to SIGKILL; a slice of the prompt must fit.
        mount: where a bucket or a claim appears on every host.
        compile_cache: directory, the same on every host; `mount`/compile-cache if there is a mount.
        spot: rent what may be taken away at any time.

    The others are what a scheduler calls by that name, None if it was not given.

    Raises:
        ConfigError: if a value is none of its kind.
    """

    name: str = "qwen-jax"
    image: str | None = None
    project: str | None = None
    zone: str | None = None
    cluster: str | None = None
    namespace: str = "default"
    service_account: str | None = None
    claim: str | None = None
    bucket: str | None = None
    storage: str | None = None
    mount: str = "/data"
    compile_cache: str | None = None
    runtime_version: str | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    address: str = DASHBOARD
    max_restarts: int = 10
    grace: int = 120
    spot: bool = False

    def __post_init__(self):
        for name, (pattern, meaning) in _PATTERNS.items():
            value = getattr(self, name)
            if value is not None and re.fullmatch(pattern, value, re.ASCII) is None:
                raise ConfigError(f"{spelled(name)} {value!r} must be {meaning}")
        for name, least, most in (("max_restarts", 0, 1 << 16), ("grace", 1, 86400)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(
                    f"{spelled(name)} {getattr(self, name)} must be from {least} to {most}"
                )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job(Place):
    """One command on every host of a topology.

    Attributes:
        command: run by bash, in the same way on every host.

    Raises:
        ConfigError: if a value is none of its kind.
    """

    topology: Topology
    command: str

    def __post_init__(self):
        Place.__post_init__(self)
        if not self.command.strip():
            raise ConfigError("--command is empty: give what every host runs")
        if bad := re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", self.command):
            raise ConfigError(f"--command has a control character, {bad[0]!r}")

    @property
    def hosts(self) -> accelerators.Hosts:
        return accelerators.hosts(self.topology)

    def check(self, kind: str, takes: str, needs: str) -> None:
        """Refuses a job that lacks what its scheduler must know, or says what it cannot use.

        Args:
            takes: fields that have a meaning there, beside topology, command and name.
            needs: fields of which none may be missing; alternatives as `claim|bucket`, of which
                there must be one.

        Raises:
            ConfigError: naming every flag that is missing, or the first that has no effect.
        """
        known = {"topology", "command", "name", *takes.split()}
        for field in dataclasses.fields(self):
            if field.name not in known and getattr(self, field.name) != field.default:
                raise ConfigError(f"{spelled(field.name)} has no effect with {kind}: leave it out")
        missing = []
        for each in needs.split():
            names = each.split("|")
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                raise ConfigError(f"{' and '.join(map(spelled, given))}: give one of them")
            if not given:
                missing.append(" or ".join(map(spelled, names)))
        if missing:
            raise ConfigError(f"{kind} also needs {', '.join(missing)}")

    def environment(self) -> dict[str, str]:
        """Variables of the command."""
        cache = self.compile_cache or f"{self.mount.rstrip('/')}/compile-cache"
        found = {"JAX_COMPILATION_CACHE_DIR": cache}
        if self.hosts.is_tpu:
            return found | {"JAX_COORDINATOR_PORT": str(PORT)}
        # Without it jax takes three quarters of a GPU, and the planner counts on more.
        return found | {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".93"}


def spelled(name: str) -> str:
    """A field as the flag that gives it."""
    return "--" + name.replace("_", "-")


def numbered(command: str, coordinator: str, count: int, index: str) -> str:
    """The command with the flags that tell a process which of how many it is.

    Args:
        coordinator: host and port, for the shell.
        index: number of the process, for the shell.

    Raises:
        ConfigError: if it is more than one command, so that flags at its end may miss it.
    """
    bare = re.sub(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*\"""", "x", command, flags=re.DOTALL)
    if re.search(r"['\"]|\\$", bare):
        raise ConfigError("--command has a quote that is not closed")
    if re.search(r"[();<>|&\n]|(?:^|\s)#", bare):
        raise ConfigError(
            "--command must be one command here, since --coordinator, --num-processes and "
            "--process-id are added at its end: put more into a script that hands on its arguments"
        )
    return f"{command} --coordinator {coordinator} --num-processes {count} --process-id {index}"


def yaml_text(content: object) -> str:
    """A document as YAML, in the order that it has."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def script(*lines: str) -> str:
    """A shell script of these lines, without the empty ones of what was left out."""
    return "\n".join(["#!/usr/bin/env bash", *(line for line in lines if line)]) + "\n"


def flag(name: str, value: str) -> str:
    """A flag of a command line with its value, for the shell."""
    return f"{name}={shlex.quote(value)}"


def write(directory: Path, files: dict[str, str], *, overwrite: bool) -> list[Path]:
    """Writes files into a directory, which is made, and lets scripts be executed.

    Args:
        overwrite: replace those that are there, if they were written here.

    Raises:
        ConfigError: if one is there and may not be overwritten, or the directory is a file.
        OSError: if one was not written here, or cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{shown(directory)} is a file: give a directory with --out")
    paths = [directory / name for name in files]
    there = [path for path in paths if os.path.lexists(path)]
    if there and not overwrite:
        names = ", ".join(map(shown, there))
        raise ConfigError(f"{names} exists: take another --out, or add --overwrite")
    for path in there:
        atomic.check_ours(path, _is_ours)
    directory.mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, files.values(), strict=True):
        atomic.write(path, _marked(text))
        if text.startswith("#!"):
            path.chmod(0o755)
    return paths


def _marked(text: str) -> str:
    """A file with its format in a comment; that of JSON has a field for it."""
    if text.startswith("{"):
        return text
    first, rest = text.split("\n", 1) if text.startswith("#!") else ("", text)
    return f"{first}\n# {FORMAT}\n{rest}".lstrip()


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(4096)
