"""Scheduler jobset: a manifest of JobSet (jobset.sigs.k8s.io) on GKE.

It is one indexed Job with a pod for each host, in a headless service by which they find each other.
GKE sets TPU_WORKER_ID and TPU_WORKER_HOSTNAMES in pods that request a whole slice, from which JAX
starts; GPUs get flags. A pod that exits with 75, or whose node is preempted, fails the Job by its
pod failure policy, upon which the JobSet restarts without counting; other failures count.
"""

from typing import Any

from qwen_jax.distributed.multihost import PREEMPTED
from qwen_jax.jobs.job import PORT, Job, numbered, yaml_text

_TAKES = "image namespace service_account claim bucket mount compile_cache max_restarts grace spot"
_RUNTIME_PORT = 8471  # of libtpu, between the hosts of a slice
_PODS = "hosts"

START = "kubectl apply -f {}/jobset.yaml"
"""Command that starts the job; `{}` stands for the quoted path of its directory."""


def files(job: Job) -> dict[str, str]:
    """Returns the texts of the job's files by name.

    Raises:
        ConfigError: if a required field is missing.
    """
    job.check("jobset", _TAKES, "image claim|bucket")
    return {"jobset.yaml": yaml_text(manifest(job))}


def manifest(job: Job) -> dict[str, Any]:
    """Returns the JobSet's manifest."""
    count = job.hosts.count
    metadata: dict[str, Any] = {"name": job.name, "namespace": job.namespace}
    if count > 1 and job.hosts.is_tpu:
        # All pods into one node pool, which is one slice.
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    conditions = [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": _PODS, "operator": "In", "values": [PREEMPTED]},
        },
        {
            "action": "FailJob",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
    ]
    template = {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": conditions},
        "template": _pod(job),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {
                "enableDNSHostnames": True,
                "subdomain": job.name,
                "publishNotReadyAddresses": True,
            },
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": _PODS, "replicas": 1, "template": {"spec": template}}],
        },
    }


def _pod(job: Job) -> dict[str, Any]:
    hosts = job.hosts
    chips, label = {hosts.resource: hosts.chips}, hosts.named("gke", "GKE")
    volumes, mounts, ports = [_data(job)], [{"name": "data", "mountPath": job.mount}], [PORT]
    if hosts.is_tpu:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": label,
            "cloud.google.com/gke-tpu-topology": hosts.sides,
        }
        ports.insert(0, _RUNTIME_PORT)
    else:
        selector = {"cloud.google.com/gke-accelerator": label}
        # NCCL passes data between the GPUs of a host through it.
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": _PODS,
        "image": job.image,
        "command": ["/bin/bash", "-c", _literal(_command(job))],
        "env": [{"name": name, "value": value} for name, value in job.environment().items()],
        "ports": [{"containerPort": port} for port in ports],
        "resources": {"requests": chips, "limits": dict(chips)},
        "volumeMounts": mounts,
    }
    if hosts.is_tpu:
        # The devices of a TPU node are root's, and libtpu locks memory.
        container["securityContext"] = {"privileged": True, "runAsUser": 0}
    pod: dict[str, Any] = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}}
    if job.bucket is None:
        pod = {}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        "nodeSelector": selector,
        "tolerations": [{"key": hosts.resource, "operator": "Exists"}],
        "securityContext": {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"},
        "containers": [container],
        "volumes": volumes,
    }
    if job.service_account is not None:
        spec["serviceAccountName"] = job.service_account
    return pod | {"spec": spec}


def _data(job: Job) -> dict[str, Any]:
    """Returns the volume that every host reads and writes: a claim, else a bucket."""
    if job.claim is not None:
        return {"name": "data", "persistentVolumeClaim": {"claimName": job.claim}}
    return {
        "name": "data",
        "csi": {
            "driver": "gcsfuse.csi.storage.gke.io",
            "volumeAttributes": {"bucketName": job.bucket, "mountOptions": "implicit-dirs"},
        },
    }


def _command(job: Job) -> str:
    if job.hosts.is_tpu or job.hosts.count == 1:
        return job.command
    first = f"{job.name}-{_PODS}-0-0.{job.name}:{PORT}"
    return numbered(job.command, first, job.hosts.count, '"$JOB_COMPLETION_INDEX"')


def _literal(text: str) -> str:
    """Escapes text for Kubernetes, which expands $$ to $, and $(NAME) as a variable."""
    return text.replace("$", "$$")
