"""Restriction of verbs to one process or one device."""

from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.planner import devices

ONE = "seq=1"
"""A mesh of one device, which runs on any machine."""

_DETECTION_S = 10  # for a scheduler to say who is who


def one_process(what: str) -> None:
    """Refuses to run a verb that takes no `HostFlags` in each process of a job.

    Raises:
        ConfigError: if the environment says that this process is one of several.
    """
    place = multihost.find(None, None, None, _DETECTION_S)
    if place is not None:
        raise ConfigError(
            f"{what} in one process, but the environment says that this is process "
            f"{place.process} of {place.count}: start a job of one process"
        )


def one_device(mesh: str | None, what: str) -> str:
    """Returns the `--mesh` of verbs that run on one device.

    Raises:
        ConfigError: if several devices or processes are asked for.
    """
    from qwen_jax.distributed import sharding

    one_process(what)
    if mesh is not None and sharding.parse(mesh).size > 1:
        raise ConfigError(f"--mesh {mesh}: {what} on one device: leave it out")
    devices.found()
    return ONE
