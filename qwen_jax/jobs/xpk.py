"""Scheduler xpk: a script that runs `xpk workload create` (github.com/AI-Hypercomputer/xpk)."""

import base64
import shlex

from qwen_jax.config import ConfigError
from qwen_jax.distributed.multihost import PREEMPTED
from qwen_jax.jobs import accelerators
from qwen_jax.jobs.job import PORT, Job, flag, numbered, script

_TAKES = "image project zone cluster storage compile_cache max_restarts grace"
_FEWEST = 8  # chips of a v5e slice

START = "bash {}/submit.sh"
"""Command that starts the job; `{}` stands for the quoted path of its directory."""


def files(job: Job) -> dict[str, str]:
    """Returns the texts of the job's files by name.

    Raises:
        ConfigError: if a required field is missing, or xpk has no such devices.
    """
    job.check("xpk", _TAKES, "image project zone cluster compile_cache")
    hosts = accelerators.hosts(job.topology, whole=False)
    command, named = job.command, hosts.named("xpk", "xpk")
    if hosts.is_tpu:
        if job.topology.kind == "v5e" and job.topology.count < _FEWEST:
            raise ConfigError(f"xpk has v5e from {_FEWEST} chips on: take v5e:2x4, or jobset")
        devices = [flag("--tpu-type", f"{named}-{hosts.sides}")]
    else:
        whole = job.topology.device.per_host
        if hosts.chips != whole:
            raise ConfigError(f"xpk has whole hosts of {whole} GPUs: take jobset for {hosts.chips}")
        devices = [
            flag("--device-type", f"{named}-{whole}"),
            flag("--num-nodes", str(hosts.count)),
        ]
        if hosts.count > 1:
            first = f"{job.name}-slice-job-0-0.{job.name}:{PORT}"
            command = numbered(command, first, hosts.count, '"$JOB_COMPLETION_INDEX"')
    arguments = [
        *(flag(f"--{name}", getattr(job, name)) for name in ("project", "zone", "cluster")),
        flag("--workload", job.name),
        *devices,
        flag("--docker-image", job.image or ""),
        flag("--max-restarts", str(job.max_restarts)),
        flag("--restart-on-exit-codes", str(PREEMPTED)),
        flag("--termination-grace-period-seconds", str(job.grace)),
        *(flag("--env", f"{name}={value}") for name, value in job.environment().items()),
        *([flag("--storage", job.storage)] if job.storage else []),
        flag("--command", _plain(command)),
    ]
    text = script(
        "# Submits the workload; `xpk workload list` and `xpk workload delete` look after it.",
        "# What is encoded below is:",
        *(f"#   {line}" for line in command.splitlines()),
        "set -euo pipefail",
        "exec xpk workload create \\",
        " \\\n".join(f"  {each}" for each in arguments),
    )
    return {"submit.sh": text}


def _plain(command: str) -> str:
    """Rewrites the command for bash without quotes, dollars, backslashes and line breaks.

    xpk inserts it into YAML unescaped, for GPUs between double quotes too, and Kubernetes expands
    dollars.
    """
    text = base64.b64encode(f"exec bash -c {shlex.quote(command)}\n".encode()).decode()
    return f"exec bash <(echo {text} | base64 -d)"
