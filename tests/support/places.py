"""A job for every scheduler, and what was written for it."""

from qwen_jax.jobs import gcloud, jobset, ray, slurm, xpk
from qwen_jax.jobs.job import Job
from qwen_jax.planner import devices

IMAGE = "europe-docker.pkg.dev/p/r/qwen-jax:1"
CLOUD = {"image": IMAGE, "project": "my-project", "zone": "us-west4-a"}
PLACES = {
    "jobset": (jobset, {"image": IMAGE, "bucket": "texts"}),
    "xpk": (xpk, CLOUD | {"cluster": "pods", "compile_cache": "/data/cc"}),
    "gcloud": (gcloud, CLOUD | {"bucket": "texts"}),
    "ray": (ray, {"compile_cache": "/data/cc"}),
    "slurm": (slurm, {"partition": "gpu", "time": "4:00:00", "compile_cache": "/data/cc"}),
}


def job(kind: str, topology: str, command: str = "qwen-jax doctor", **more) -> Job:
    return Job(topology=devices.topology(topology), command=command, **(PLACES[kind][1] | more))


def files(kind: str, topology: str, command: str = "qwen-jax doctor", **more) -> dict[str, str]:
    return PLACES[kind][0].files(job(kind, topology, command, **more))
