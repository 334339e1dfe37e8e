"""Scheduler slurm: a batch script with one process on every node.

jax knows Slurm's variables; one process takes all GPUs of its node (JAX_LOCAL_DEVICE_IDS), where
jax by itself would take one. No process is killed because another failed: they notice themselves,
and a killed one would hide exit code 75 behind a larger one.
"""

import shlex

from qwen_jax.config import ConfigError
from qwen_jax.distributed.multihost import PREEMPTED
from qwen_jax.jobs.job import Job, script

START = "sbatch {}/job.sbatch"
"""Command that starts the job; `{}` stands for the quoted path of its directory."""


def files(job: Job) -> dict[str, str]:
    """Returns the texts of the job's files by name.

    Raises:
        ConfigError: if a required field is missing, or the devices are not GPUs.
    """
    hosts = job.hosts
    if hosts.is_tpu:
        raise ConfigError(f"slurm runs GPUs, not {job.topology.kind}: take jobset, xpk or gcloud")
    takes = "partition account time compile_cache grace"
    job.check("slurm", takes, "partition time compile_cache")
    options = {
        "job-name": job.name,
        "partition": job.partition,
        "account": job.account,
        "nodes": hosts.count,
        "ntasks-per-node": 1,
        "gres": f"gpu:{hosts.chips}",
        "exclusive": None if hosts.chips < job.topology.device.per_host else "",
        "time": job.time,
        "signal": f"B:TERM@{job.grace}",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    variables = job.environment() | {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(hosts.chips)))}
    text = script(
        *(
            f"#SBATCH --{name}{'=' if value != '' else ''}{value}"
            for name, value in options.items()
            if value is not None
        ),
        "set -uo pipefail",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "# srun hands the signal on to every process. A wait that it ends is not the last one.",
        "told= step=",
        'trap \'told=1; [ -z "$step" ] || kill -TERM "$step"\' TERM',
        f"srun --kill-on-bad-exit=0 bash -c {shlex.quote(job.command)} &",
        "step=$!",
        '[ -z "$told" ] || kill -TERM "$step"',
        "told=1",
        "code=127",
        'while [ -n "$told" ]; do',
        "  told=",
        '  wait "$step"',
        "  status=$?",
        '  [ "$status" -eq 127 ] || code=$status',
        "done",
        f'if [ "$code" -eq {PREEMPTED} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    )
    return {"job.sbatch": text}
