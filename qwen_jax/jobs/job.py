"""Job: one command on every host of a topology, with the fields that schedulers need."""

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
"""Mark in every file of a job, by which this program recognises and may overwrite it."""

PORT = 8476
"""Port of JAX's coordinator. Google's firewall opens it between the hosts of a slice, but not 8482,
JAX's default (github.com/jax-ml/jax/issues/35905)."""
DASHBOARD = "http://127.0.0.1:8265"
"""Default address of Ray's job server, through a tunnel or on the head node."""

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
    """Resources and limits of a job: what export-job asks for beside the command.

    Attributes:
        name: name of the job and prefix of what is made for it.
        max_restarts: restarts after other failures than exit code 75.
        grace: seconds from SIGTERM to SIGKILL; a slice of the prompt must fit.
        mount: path at which a bucket or a claim appears on every host.
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
        """Checks that a scheduler's required fields are given, and none that it cannot use.

        Args:
            kind: name of the scheduler in errors.
            takes: fields that it uses, beside topology, command and name.
            needs: required fields; of alternatives such as `claim|bucket` exactly one.

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
        """Environment variables of the command."""
        cache = self.compile_cache or f"{self.mount.rstrip('/')}/compile-cache"
        found = {"JAX_COMPILATION_CACHE_DIR": cache}
        if self.hosts.is_tpu:
            return found | {"JAX_COORDINATOR_PORT": str(PORT)}
        # Without it jax takes three quarters of a GPU, and the planner counts on more.
        return found | {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".93"}


def spelled(name: str) -> str:
    """Returns the flag of a field."""
    return "--" + name.replace("_", "-")


def numbered(command: str, coordinator: str, count: int, index: str) -> str:
    """Appends the flags of a multi-process job to the command.

    Args:
        coordinator: HOST:PORT of the coordinator, quoted for the shell.
        count: number of processes.
        index: index of the process, quoted for the shell.

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
    """Formats a document as YAML, in its own order."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def script(*lines: str) -> str:
    """Joins lines to a shell script, without empty ones."""
    return "\n".join(["#!/usr/bin/env bash", *(line for line in lines if line)]) + "\n"


def flag(name: str, value: str) -> str:
    """Formats a flag with its value, quoted for the shell."""
    return f"{name}={shlex.quote(value)}"


def write(directory: Path, files: dict[str, str], *, overwrite: bool) -> list[Path]:
    """Writes files into a directory, created if missing, and makes scripts executable.

    Args:
        files: texts by name.
        overwrite: replace existing files, if this program wrote them.

    Raises:
        ConfigError: if one exists and may not be overwritten, or the directory is a file.
        OSError: if one was not written by this program, or cannot be written.
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
    """Adds the format as a comment to a file; JSON has a field for it."""
    if text.startswith("{"):
        return text
    first, rest = text.split("\n", 1) if text.startswith("#!") else ("", text)
    return f"{first}\n# {FORMAT}\n{rest}".lstrip()


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(4096)
