"""Scheduler gcloud: scripts that create a TPU VM, run the command on its hosts, and delete it."""

import shlex

from qwen_jax.config import ConfigError
from qwen_jax.distributed.multihost import PREEMPTED
from qwen_jax.jobs.job import Job, flag, script

_USER = 1000  # of the image
_TAKES = "image project zone bucket mount compile_cache runtime_version max_restarts grace spot"

START = "bash {}/run.sh"
"""Command that starts the job; `{}` stands for the quoted path of its directory."""


def files(job: Job) -> dict[str, str]:
    """Returns the texts of the job's files by name.

    Raises:
        ConfigError: if a required field is missing, or there are no such TPU VMs.
    """
    if not job.hosts.is_tpu:
        raise ConfigError(
            f"gcloud rents TPU VMs, not {job.topology.kind}: take slurm, ray or jobset"
        )
    vm_type = job.hosts.vm_type
    job.check("gcloud", _TAKES, "image project zone bucket")
    return {
        "run.sh": _run(job, vm_type),
        "setup.sh": _setup(job),
        "job.sh": _job(job),
        "delete.sh": script(
            "# Gives the TPU back; what it wrote into the bucket stays.",
            "set -euo pipefail",
            f"exec {_gcloud('queued-resources', 'delete', job)} --force --quiet",
        ),
    }


def _gcloud(group: str, verb: str, job: Job) -> str:
    where = " ".join(flag(f"--{name}", getattr(job, name)) for name in ("project", "zone"))
    return f"gcloud compute tpus {group} {verb} {job.name} {where}"


def _run(job: Job, vm_type: str) -> str:
    where = " ".join(flag(f"--{name}", getattr(job, name)) for name in ("project", "zone"))
    create = " ".join(
        [
            _gcloud("queued-resources", "create", job),
            flag("--node-id", job.name),
            flag("--accelerator-type", vm_type),
            flag("--runtime-version", job.runtime_version or job.hosts.accelerator.runtime or ""),
            *(["--spot"] if job.spot else []),
        ]
    )
    return script(
        "# Rents the TPU, runs the command on all hosts and gives the TPU back when it is done.",
        "# Exit code 75 and a TPU that was taken away are tried again without being counted.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        "failures=0",
        "state() {",
        f"  {_gcloud('queued-resources', 'describe', job)} \\",
        "    --format='value(state.state)' 2>/dev/null || true",
        "}",
        "failed() {",
        "  failures=$((failures + 1))",
        f'  if [ "$failures" -gt {job.max_restarts} ]; then',
        '    echo "gave up after $failures failures: bash delete.sh gives the TPU back" >&2',
        "    exit 1",
        "  fi",
        "}",
        "while true; do",
        '  case "$(state)" in',
        "    ACTIVE) ;;",
        f'    "") {create} || {{ failed; sleep 60; }}; continue ;;',
        "    FAILED) failed; bash delete.sh; continue ;;",
        "    SUSPENDED) bash delete.sh; continue ;;",
        "    *) sleep 30; continue ;;",
        "  esac",
        "  code=0",
        f"  gcloud compute tpus tpu-vm scp setup.sh job.sh {job.name}: {where} \\",
        "    --worker=all --quiet \\",
        f"    && gcloud compute tpus tpu-vm ssh {job.name} {where} --worker=all --quiet \\",
        "      --command='bash setup.sh && bash job.sh' || code=$?",
        '  case "$code" in',
        "    0) exec bash delete.sh ;;",
        f'    {PREEMPTED}) echo "preempted: the command is run again" >&2 ;;',
        '    2) echo "the command was refused: bash delete.sh gives the TPU back" >&2; exit 2 ;;',
        '    *) if [ "$(state)" = ACTIVE ]; then failed; fi ;;',
        "  esac",
        "done",
    )


def _setup(job: Job) -> str:
    """Returns the script that sets up a host once: it mounts the bucket and fetches the image."""
    image, mount = job.image or "", shlex.quote(job.mount)
    registry = image.split("/")[0]
    login = registry.endswith((".pkg.dev", "gcr.io"))
    source = "https://packages.cloud.google.com/apt"
    return script(
        "# Mounts the bucket and fetches the image, where that was not done before.",
        "set -euo pipefail",
        "if ! command -v gcsfuse >/dev/null; then",
        "  key=/usr/share/keyrings/cloud.google.asc",
        f"  curl -fsSL {source}/doc/apt-key.gpg | sudo tee $key >/dev/null",
        f'  echo "deb [signed-by=$key] {source} gcsfuse-$(lsb_release -cs) main" \\',
        "    | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null",
        "  sudo apt-get update -q",
        "  sudo apt-get install -q -y gcsfuse",
        "fi",
        f"sudo mkdir -p {mount}",
        f"mountpoint -q {mount} || sudo gcsfuse -o allow_other --implicit-dirs \\",
        f"  --uid {_USER} --gid {_USER} {shlex.quote(job.bucket or '')} {mount}",
        f"sudo gcloud auth configure-docker {registry} --quiet" if login else "",
        f"sudo docker pull --quiet {shlex.quote(image)}",
    )


def _job(job: Job) -> str:
    return script(
        "# Runs the command in the image, after what is left of an earlier run is gone.",
        "set -euo pipefail",
        f"sudo docker rm --force {job.name} >/dev/null 2>&1 || true",
        f"exec sudo docker run --rm --init --name {job.name} --privileged --net=host \\",
        f"  --user 0 --ulimit memlock=-1:-1 --stop-timeout {job.grace} \\",
        *(f"  {flag('--env', f'{key}={value}')} \\" for key, value in job.environment().items()),
        f"  --volume {shlex.quote(f'{job.mount}:{job.mount}')} \\",
        f"  --entrypoint /bin/bash {shlex.quote(job.image or '')} -c \\",
        f"  {shlex.quote(job.command)}",
    )
