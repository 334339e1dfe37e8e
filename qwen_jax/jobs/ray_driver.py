"""Driver of a Ray job: a task on every host, which runs the command there.

It is started by `ray job submit` with a job.json that `jobs.ray` wrote, and needs Ray.
"""

import importlib
import os
import subprocess
import sys
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from qwen_jax.files import reading

_Count = Annotated[int, Meta(ge=1, le=1 << 20)]


class Parameters(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Content of a job.json."""

    format: Literal["qwen-jax job 1"]
    command: str
    hosts: _Count
    chips: _Count
    resource: Literal["TPU", "GPU"]
    topology: str | None
    tpu: str | None
    preempted: Annotated[int, Meta(ge=1, le=255)]
    max_restarts: Annotated[int, Meta(ge=0, le=1 << 20)]


def run(command: str, variables: dict[str, str]) -> int:
    """Runs the command in bash on this host; returns its exit code."""
    return subprocess.run(["bash", "-c", command], env=os.environ | variables).returncode


def attempt(ray: Any, parameters: Parameters) -> list[int]:
    """Runs the command once on every host; returns the exit codes, 1 for a host that is lost."""
    count, resource = parameters.hosts, parameters.resource
    group, release = _reserve(ray, parameters)
    try:
        ray.get(group.ready())
        strategies = importlib.import_module("ray.util.scheduling_strategies")

        def remote(function: Any, index: int, chips: int) -> Any:
            needs = {"num_gpus": chips} if resource == "GPU" else {"resources": {"TPU": chips}}
            where = strategies.PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            )
            return ray.remote(function).options(
                num_cpus=0, max_retries=0, scheduling_strategy=where, **(needs if chips else {})
            )

        first = ray.get(remote(ray.util.get_node_ip_address, 0, 0).remote())
        tasks = [
            remote(run, index, parameters.chips).remote(
                parameters.command,
                {"QWEN_JAX_COORDINATOR": first, "QWEN_JAX_PROCESS": str(index)},
            )
            for index in range(count)
        ]
        return [_code(ray, index, task) for index, task in enumerate(tasks)]
    finally:
        release()


def _reserve(ray: Any, parameters: Parameters) -> tuple[Any, Any]:
    """Reserves a placement group with a bundle on every host; also returns what releases it."""
    if parameters.resource == "TPU":
        tpu = importlib.import_module("ray.util.tpu")
        held = tpu.slice_placement_group(
            topology=parameters.topology,
            accelerator_version=parameters.tpu,
            chips_per_vm=parameters.chips,
        )
        return held.placement_group, held.shutdown
    bundle = {"GPU": parameters.chips}
    group = ray.util.placement_group([bundle] * parameters.hosts, strategy="STRICT_SPREAD")
    return group, lambda: ray.util.remove_placement_group(group)


def _code(ray: Any, index: int, task: Any) -> int:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        print(f"host {index} is lost: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return 1


def main(path: str) -> int:
    """Runs a job.json until it succeeds, is refused or fails too often; returns the exit code.

    The command counts as preempted if a host exits with `preempted` and none was refused.
    """
    try:
        parameters = msgspec.convert(reading.read_object(path), Parameters)
    except reading.FileError as error:  # which names the file
        print(f"error: {error}", file=sys.stderr)
        return 2
    except msgspec.ValidationError as error:
        print(f"error: {reading.shown(path)}: {reading.printable(error)}", file=sys.stderr)
        return 2
    ray = importlib.import_module("ray")
    ray.init()
    failures = 0
    while True:
        codes = attempt(ray, parameters)
        print(f"exit codes: {', '.join(map(str, codes))}", file=sys.stderr, flush=True)
        if not any(codes):
            return 0
        if 2 in codes:
            return 2
        if parameters.preempted in codes:
            continue
        failures += 1
        if failures > parameters.max_restarts:
            return next(filter(None, codes))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
