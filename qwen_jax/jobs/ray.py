"""Scheduler ray: a submission to Ray's job server, and its driver's parameters (`ray_driver`)."""

import json

from qwen_jax.distributed.multihost import PREEMPTED
from qwen_jax.jobs.job import FORMAT, PORT, Job, flag, numbered, script, yaml_text

START = "bash {}/submit.sh"
"""Command that starts the job; `{}` stands for the quoted path of its directory."""


def files(job: Job) -> dict[str, str]:
    """Returns the texts of the job's files by name.

    Raises:
        ConfigError: if a required field is missing.
    """
    job.check("ray", "compile_cache address max_restarts", "compile_cache")
    hosts = job.hosts
    parameters = {
        "format": FORMAT,
        "command": job.command,
        "hosts": hosts.count,
        "chips": hosts.chips,
        "resource": "TPU" if hosts.is_tpu else "GPU",
        "topology": hosts.sides,
        "tpu": hosts.accelerator.ray,
        "preempted": PREEMPTED,
        "max_restarts": job.max_restarts,
    }
    if not hosts.is_tpu and hosts.count > 1:
        # The driver knows the address only when the hosts are there.
        index = '"$QWEN_JAX_PROCESS"'
        parameters["command"] = numbered(
            job.command, f'"$QWEN_JAX_COORDINATOR":{PORT}', hosts.count, index
        )
    submit = script(
        "# Submits the job and follows its log until it ends.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        f"exec ray job submit {flag('--address', job.address)} --working-dir=. \\",
        "  --runtime-env=runtime_env.yaml -- python -m qwen_jax.jobs.ray_driver job.json",
    )
    return {
        "submit.sh": submit,
        "runtime_env.yaml": yaml_text({"env_vars": job.environment()}),
        "job.json": json.dumps(parameters, indent=2, ensure_ascii=False) + "\n",
    }
