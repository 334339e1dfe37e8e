"""xpk: a script that runs `xpk workload create` (github.com/AI-Hypercomputer/xpk)."""

import shlex

from qwen_jax.config import ConfigError
from qwen_jax.jobs import accelerators
from qwen_jax.jobs.job import PORT, PREEMPTED, Job, flag, numbered, script

_TAKES = "image project zone cluster storage compile_cache max_restarts grace"
_FEWEST = 8  # chips of a v5e slice


def files(job: Job) -> dict[str, str]:
    """Names and texts of the files.

    Raises:
        ConfigError: if something is missing, or xpk has no such devices.
    """
    job.check("xpk", _TAKES, "image project zone cluster compile_cache")
    hosts = accelerators.hosts(job.topology, whole=False)
    command = job.command
    if hosts.accelerator.platform == "tpu":
        if job.topology.kind == "v5e" and job.topology.count < _FEWEST:
            raise ConfigError(f"xpk has v5e from {_FEWEST} chips on: take v5e:2x4, or jobset")
        devices = [flag("--tpu-type", f"{hosts.accelerator.xpk}-{hosts.sides}")]
    else:
        whole = hosts.accelerator.per_host
        if hosts.chips != whole:
            raise ConfigError(f"xpk has whole hosts of {whole} GPUs: take jobset for {hosts.chips}")
        devices = [
            flag("--device-type", f"{hosts.accelerator.xpk}-{whole}"),
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
        flag("--command", f"exec bash -c {_one_line(command)}"),
    ]
    text = script(
        "# Submits the workload; `xpk workload list` and `xpk workload delete` look after it.",
        "set -euo pipefail",
        "exec xpk workload create \\",
        " \\\n".join(f"  {each}" for each in arguments),
    )
    return {"submit.sh": text}


def start(directory: str) -> str:
    """What starts the job."""
    return f"bash {shlex.quote(directory)}/submit.sh"


def _one_line(text: str) -> str:
    """A word for bash, without line breaks, which would end the block of YAML that xpk puts it in.

    Nor with a dollar, which Kubernetes would read.
    """
    special = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "$": "\\x24"}
    return "$'" + "".join(special.get(each, each) for each in text) + "'"
