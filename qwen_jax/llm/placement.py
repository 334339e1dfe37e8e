"""Placement of a model: its devices, their mesh, and whether their memory suffices."""

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from qwen_jax.config import ConfigError, ModelConfig
from qwen_jax.distributed import multihost
from qwen_jax.llm.options import Spell
from qwen_jax.planner import devices

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwen_jax.distributed import sharding
    from qwen_jax.engine.layout import EngineConfig


def mesh(config: ModelConfig, wanted: str | None, spell: Spell = str) -> "Mesh | None":
    """Creates the mesh that runs a model; None for the first device alone.

    Args:
        wanted: mesh shape such as "seq=4,tensor=2". None for all accelerators, else one CPU; in
            a multi-process job, for the devices of all processes. A CPU is divided into as many
            devices as the shape has, if JAX has not initialised it yet.
        spell: spells the names of options in errors.

    Raises:
        ConfigError: if there are not as many devices, or the model cannot be split over them.
    """
    import jax

    from qwen_jax.distributed import sharding

    shape = None if wanted is None else sharding.parse(wanted)
    processes = multihost.count()
    if processes > 1 and shape is not None:
        _check_processes(shape, processes, spell("mesh"))
    if shape is not None and shape.size > 1:
        with contextlib.suppress(RuntimeError):  # in use: what is missing is said below
            jax.config.update("jax_num_cpu_devices", shape.size // processes)
    found = devices.found()
    if shape is None:
        count = 1 if found[0].platform == "cpu" and processes == 1 else len(found)
        shape = sharding.default_mesh(config, count)
    if shape.size == 1:
        return None
    sharding.check(config, shape, len(found))
    return sharding.make_mesh(found, **dataclasses.asdict(shape))


def _check_processes(shape: "sharding.MeshShape", processes: int, name: str) -> None:
    if shape.data > 1:
        raise ConfigError(
            f"{name} {shape}: replicas (data={shape.data}) share no step, which the "
            f"{processes} processes of a job do: leave data out, or run a job for each replica"
        )
    if shape.size % processes:
        raise ConfigError(
            f"{name} {shape} has {shape.size} devices, which {processes} processes cannot "
            "share evenly"
        )


def check_memory(
    config: ModelConfig,
    engine: "EngineConfig",
    dtype: str,
    mesh: "Mesh | None",
    *,
    window: int = 0,
    beside: int = 0,
    spell: Spell = str,
) -> None:
    """Refuses what the devices cannot hold, by the planner's arithmetic.

    Args:
        dtype: of weights and cache.
        window: see `layout.load`.
        beside: bytes on a device of the caches of other engines.
        spell: spells names of options.

    Raises:
        ConfigError: naming what is needed, what there is and the way out.
    """
    import jax

    from qwen_jax.distributed import sharding
    from qwen_jax.engine import layout
    from qwen_jax.engine import memory as budget

    shape = sharding.MeshShape(**mesh.shape) if mesh else sharding.MeshShape()
    device = (
        jax.local_devices()[0] if mesh is None or multihost.count() > 1 else mesh.devices.flat[0]
    )
    limit = devices.memory(device, share=-(-shape.size // multihost.count()))
    load = layout.load(
        config,
        engine,
        shape,
        platform=device.platform,
        relayouts_weights=devices.relays(device),
        dtype=dtype,
        window=window,
    )
    needed = budget.memory(config, load, shape).total + beside
    if limit is not None and needed > limit:
        cache = f"{engine.max_len:,} tokens"
        if engine.max_seqs > 1:
            cache = f"{engine.max_seqs} x {cache}"
        if engine.prefix_tokens:
            cache += f" of which {engine.prefix_tokens:,} are shared"
        way_out = "`qwen-jax plan` says what would fit"
        without = dataclasses.replace(load, window=0)
        if budget.memory(config, without, shape).total + beside <= limit:
            cache += f", and {load.window:,} of them once more on their way to or from the disk,"
            way_out = (
                f"a session prefilled with a smaller {spell('save_every')} moves fewer at a time"
            )
        if beside and needed - beside <= limit:
            cache += f", beside {beside / 2**30:,.2f} GiB of caches of other engines,"
            way_out = (
                f"close what is not needed, or open the model with a smaller {spell('max_len')}"
            )
        where = f"each of {shape.size} devices as {shape}" if mesh else "the device"
        raise ConfigError(
            f"weights and a cache of {cache} take {needed / 2**30:,.2f} GiB "
            f"on {where}, which has {limit / 2**30:,.2f} GiB: {way_out}"
        )
