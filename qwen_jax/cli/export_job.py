"""export-job: files that run a command on a topology, for common schedulers."""

import dataclasses
import importlib
import shlex
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from qwen_jax.cli.flags import ModelFlags, expand, note, option
from qwen_jax.cli.plan import LoadFlags, Topology, examine, opened_or_published
from qwen_jax.config import ConfigError
from qwen_jax.files.reading import shown
from qwen_jax.jobs.job import Job, Place, write
from qwen_jax.models import presets
from qwen_jax.planner import devices


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlaceFlags(Place):
    """Flags that say where a job runs."""

    helps: ClassVar[dict[str, Any]] = {
        "name": typer.Option(help="Of the job, and of what is made for it."),
        "image": option("Image with qwen-jax (docs/pods.md; not for slurm and ray)."),
        "project": option("Google Cloud project (xpk, gcloud)."),
        "zone": option("Google Cloud zone (xpk, gcloud)."),
        "cluster": option("GKE cluster (xpk)."),
        "namespace": typer.Option(help="Kubernetes namespace (jobset)."),
        "service_account": option("Kubernetes service account that may use the bucket (jobset)."),
        "claim": option("Persistent volume claim that every host mounts (jobset)."),
        "bucket": option("Cloud Storage bucket that every host mounts (jobset, gcloud)."),
        "storage": option("Storage of `xpk storage` to mount (xpk)."),
        "mount": typer.Option(help="Where the claim or the bucket appears on every host."),
        "compile_cache": option(
            "Directory of compiled programs, the same on every host; in --mount by itself."
        ),
        "runtime_version": option("Software version of the TPU VM; the usual one (gcloud)."),
        "partition": option("Partition (slurm)."),
        "account": option("Account that is charged (slurm)."),
        "time": option("Time limit, as 4:00:00 (slurm)."),
        "address": typer.Option(help="Where Ray takes jobs (ray)."),
        "max_restarts": typer.Option(help="Starts after failures; preemption is not counted."),
        "grace": typer.Option(help="Seconds from SIGTERM to SIGKILL; a slice must fit."),
        "spot": option("Rent what may be taken away at any time (jobset, gcloud).", "--spot"),
    }


@expand
def export_job(
    kind: Annotated[
        Literal["jobset", "xpk", "gcloud", "ray", "slurm"],
        typer.Argument(metavar="KIND", help="jobset, xpk, gcloud, ray or slurm."),
    ],
    topology: Topology,
    command: Annotated[str, option("What bash runs on every host, all hosts alike.")],
    out: Annotated[Path, option("Directory for the files.", metavar="DIR")],
    place: PlaceFlags,
    load: LoadFlags,
    model: Annotated[
        Path | None,
        option(
            "Check that this model fits, before anything is written: a directory, a hub id, or "
            f"{' or '.join(presets.NAMES)}."
        ),
    ] = None,
    force: Annotated[bool, option("Write a job that does not fit.", "--force")] = False,
    overwrite: Annotated[
        bool, option("Overwrite files in --out that it wrote.", "--overwrite")
    ] = False,
):
    r"""Write the files that run a command on rented devices.

    Starts nothing: prints the files, and last the command that does. Every host runs the same
    command; its exit code 75 means run it again, and that is not counted as a failure.

    Examples:
        qwen-jax export-job jobset --topology v5e:4x4 --image IMAGE --bucket BUCKET --out job \
            --command "qwen-jax batch /data/7b-1m /data/in.jsonl /data/out.jsonl"
        qwen-jax export-job slurm --topology h200:8 --partition gpu --time 4:00:00 --out job \
            --compile-cache /scratch/compile --command "qwen-jax batch 7b-1m in.jsonl out.jsonl"
    """
    job = Job(topology=devices.topology(topology), command=command, **dataclasses.asdict(place))
    files = importlib.import_module(f"qwen_jax.jobs.{kind}")
    texts = files.files(job)
    hosts = job.hosts
    note(
        f"{job.topology.name}: {hosts.count * hosts.chips} chips, {hosts.count} "
        f"{'hosts' if hosts.count > 1 else 'host'} of {hosts.chips}"
    )
    _check_fits(job, model, load, force=force)
    for path in write(out, texts, overwrite=overwrite):
        print(shown(path))
    for line in files.START.format(shlex.quote(str(out))).split("\n"):
        print(shown(line))


def _check_fits(job: Job, model: Path | None, load: LoadFlags, *, force: bool) -> None:
    """Checks that the model fits, if one is given.

    Raises:
        ConfigError: if it does not, or flags about it have no model.
    """
    if model is None:
        for name, value in dataclasses.asdict(load).items():
            if value is not None:
                raise ConfigError(f"--{name} has no effect without --model")
        note("whether a model fits was not asked: --model and --tokens do")
        return
    with opened_or_published(model, None, ModelFlags(slice=load.slice)) as opened:
        found = examine(
            opened, job.topology.name, load.tokens, load.mesh, load.dtype, memory=load.memory
        )
    total, limit = (
        f"{size / 2**30:,.2f} GiB" for size in (found["bytes"]["total"], found["device"]["memory"])
    )
    text = (
        f"{found['tokens']:,} tokens take {total} of {limit} on each of {found['devices']} devices"
    )
    if found["fits"]:
        note(f"fits: {text}")
    elif force:
        note(f"does not fit, and --force writes it: {text}")
    else:
        raise ConfigError(
            f"does not fit: {text}: {', or '.join(found['advice'])} (--force writes it anyway)"
        )
