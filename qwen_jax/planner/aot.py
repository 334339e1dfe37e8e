"""Ahead-of-time compilation of the engine's programs for TPUs that are not present.

Weights and cache are `ShapeDtypeStruct`s, placed as an engine places arrays, so this needs only a
config.json and libtpu. Nothing is run.
"""

import dataclasses
import functools
import importlib.util
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.dispatch import backend
from qwen_jax.config import ConfigError, ModelConfig, SparseConfig
from qwen_jax.distributed import sharding
from qwen_jax.distributed.jax_settings import own_settings
from qwen_jax.distributed.sharding import MeshShape
from qwen_jax.engine import inputs as batch
from qwen_jax.engine import layout, model_runner
from qwen_jax.engine import memory as budget
from qwen_jax.models import kv_cache, params, rope
from qwen_jax.planner import devices
from qwen_jax.planner.hlo import Collective, collectives, sent

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A compiled step, with its memory in bytes per device.

    Attributes:
        name: name of the step, as in `model_runner.Programs`.
        arguments: bytes of weights, cache and inputs; None if the compiler refused.
        overwritten: bytes of the arguments that results are written over (donated).
        temporaries: bytes of temporary buffers.
        peak: peak memory in bytes.
        collectives: collectives of a step, with their counts.
        text: HLO text of the program after all optimisations.
        refusal: the compiler's error if the program needs too much memory; "" otherwise.
    """

    name: str
    arguments: int | None = None
    overwritten: int | None = None
    temporaries: int | None = None
    peak: int
    collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)
    text: str = ""
    refusal: str = ""

    @property
    def sent(self) -> int:
        """Bytes that a device sends to others in a step."""
        return sent(self.collectives)


def mesh_of(topology: devices.Topology, shape: MeshShape) -> Mesh:
    """Returns the mesh of one replica, on which one sequence runs, of a topology's devices.

    Raises:
        ConfigError: if there is no compiler for them, or it knows no such topology.
    """
    if topology.device.platform != "tpu":
        raise ConfigError(
            f"{topology.name}: programs can be compiled without devices for TPUs only: "
            "leave out --compile"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("the TPU compiler is not installed: pip install libtpu")
    devices.quiet_libtpu()
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{topology.name}: the TPU compiler says: {reason}") from None
    if len(found) != topology.count:
        raise ConfigError(
            f"{topology.name}: the TPU compiler knows {len(found)} smaller devices where programs "
            f"find {topology.count}"
        )
    mesh = sharding.make_mesh(found, **dataclasses.asdict(shape))
    return Mesh(mesh.devices[:1], mesh.axis_names, axis_types=mesh.axis_types)


def steps(
    config: ModelConfig,
    load: budget.Workload,
    mesh: Mesh,
    budgets: SparseConfig | None = None,
    choice: backend.Choice = None,
) -> dict[str, Callable[[], Program]]:
    """Returns functions that compile the programs of an engine for one sequence, by name.

    They are prefill, decode and, with `budgets`, sparse prefill. One that needs too much memory
    becomes a `Program` with a `refusal`.

    Args:
        choice: backends of the attention operations; None for the preferred ones.

    Raises:
        ConfigError: if a kernel cannot take the model's shapes, also when they are called.
    """
    device, dtype = mesh.devices.flat[0], jnp.dtype(load.dtype)
    platform = device.platform
    whole = NamedSharding(mesh, PartitionSpec())
    of_cache = NamedSharding(mesh, sharding.RULES.spec(kv_cache.AXES))
    padded = sharding.padded(config, mesh.shape["tensor"])
    weights, structure = model_runner.flatten(
        padded, _placed(params.abstract(padded, dtype), params.shardings(config, mesh)), dtype
    )
    table_len = load.pages
    empty = functools.partial(kv_cache.init, config, table_len + 1, load.page, dtype)
    cache = _placed(jax.eval_shape(empty), of_cache)
    rotary = _placed(jax.eval_shape(lambda: rope.table(config, table_len * load.page)), whole)
    step = batch.prefill(
        (0,) * load.slice_len,
        size=load.slice_len,
        start=0,
        pages=[],
        table_len=table_len,
        scales=(1.0, 1.0),
    )
    slots = batch.decode_slots((), max_seqs=1, table_len=table_len)
    token = batch.decode((), max_seqs=1, page_table=slots.page_table, scales=lambda _: (1.0, 1.0))
    seen = _placed(jax.ShapeDtypeStruct((1, config.vocab_size), jnp.bool), whole)
    kept = None
    if budgets is not None:
        kept = _placed(layout.workload_budgets(budgets, load, platform=platform), whole)
    try:
        backends = backend.choose(
            platform, choice, kind=device.device_kind, head_dim=config.head_dim, dtype=dtype.name
        )
    except backend.Unsupported as error:
        raise ConfigError(str(error)) from None
    made = model_runner.programs(
        model_runner.Steps(structure, None, backends), whole, of_cache, platform
    )
    args = weights, rotary, cache
    of_each = {
        "prefill": (made.prefill, *args, step),
        "prefill_sparse": (made.prefill_sparse, *args, step, kept),
        "decode": (made.decode, *args, seen, _placed(slots.sampling, whole), token),
    }
    if kept is None:
        del of_each["prefill_sparse"]
    return {name: functools.partial(_compile, mesh, name, *each) for name, each in of_each.items()}


def _compile(mesh: Mesh, name: str, function, *args) -> Program:
    try:
        with own_settings(), jax.set_mesh(mesh):
            lowered = function.lower(*args)
    except backend.Unsupported as error:
        raise ConfigError(str(error)) from None
    with tempfile.TemporaryDirectory() as dump:
        # The compiler's own text, since it may hold what jax is too old to parse.
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            memory: Any = lowered.compile(compiler_options=options).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            # The first size in the message is what the program takes.
            used = re.search(r"RESOURCE_EXHAUSTED: (.*?([\d.]+)([KMG])\b.*)", str(error))
            if used is None:
                raise
            peak = int(float(used[2]) * _UNITS[used[3]])
            return Program(name=name, peak=peak, refusal=used[1])
        (path,) = Path(dump).glob("*after_optimizations.txt")
        text = path.read_text()
    return Program(
        name=name,
        arguments=memory.argument_size_in_bytes,
        overwritten=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=collectives(text, mesh.shape),
        text=text,
    )


def programs(
    config: ModelConfig,
    load: budget.Workload,
    topology: devices.Topology,
    shape: MeshShape,
    budgets: SparseConfig | None = None,
) -> Iterator[Program]:
    """Compiles and yields the programs of an engine for one sequence on a topology.

    Raises:
        ConfigError: if they cannot be compiled for these devices.
    """
    for step in steps(config, load, mesh_of(topology, shape), budgets).values():
        yield step()


def _placed(tree, where):
    """Adds a sharding, or a tree of shardings, to the `ShapeDtypeStruct`s of a tree."""
    if isinstance(where, NamedSharding):
        where = jax.tree.map(lambda _: where, tree)

    def described(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(described, tree, where)
