"""plan: memory and time estimates for devices that are not present."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from convert.terminal import show
from qwen_jax.cli import quantities
from qwen_jax.cli.flags import Json, ModelFlags, expand, not_one_of, note, option
from qwen_jax.cli.quantities import tokens_option
from qwen_jax.config import ConfigError, ModelConfig
from qwen_jax.files import compile_cache
from qwen_jax.llm.model import Model, open_model
from qwen_jax.llm.options import Within
from qwen_jax.models import presets
from qwen_jax.planner import devices
from qwen_jax.storage import hub

if TYPE_CHECKING:
    from qwen_jax.distributed.sharding import MeshShape
    from qwen_jax.engine.memory import Workload

OptionalModel = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL",
        help=f"A checkpoint, a Hugging Face directory, a hub id, or {' or '.join(presets.NAMES)}.",
    ),
]
PublishedModel = Annotated[
    str | None,
    option(
        f"A published model in place of MODEL: {', '.join(presets.NAMES)} or its hub id.",
        metavar="NAME",
    ),
]
Topology = Annotated[
    str,
    option(
        "Devices, as v5e:4x4, v5e-16, v5p:2x2x2, tpu7x:2x2x1, h200, l40s:2 or cpu:8.",
        metavar="KIND:SIZE",
    ),
]
DeviceMemory = Annotated[
    int | None,
    typer.Option(
        help="Memory of a device, as 40GiB or 80GB, where it is not the published one.",
        parser=quantities.size,
        metavar="BYTES",
        show_default=False,
    ),
    Within(1, 1 << 50),
]

_LEAST_SLICE = 128  # tokens that advice asks for


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadFlags:
    """Flags that say what a model is to do on some devices."""

    tokens: Annotated[
        int | None,
        tokens_option(
            "Prompt and answer, in tokens: 128K, or 1M (1,048,576; Qwen2.5-1M declare 1,010,000); "
            "the longest that config.json declares."
        ),
        Within(1),
    ] = None
    mesh: Annotated[
        str | None, option("How to use the devices, as seq=4,tensor=4.", metavar="AXIS=N,...")
    ] = None
    slice: Annotated[
        int | None,
        tokens_option("Prompt tokens computed at a time; the engine's largest."),
        Within(1),
    ] = None
    dtype: Annotated[
        Literal["f32", "bf16"] | None,
        option("Precision of weights and cache; the checkpoint's own, on CPUs f32."),
    ] = None
    memory: DeviceMemory = None


@contextlib.contextmanager
def opened_or_published(
    model: Path | None, config: str | None, flags: ModelFlags
) -> Iterator[Model]:
    """Opens the named model, without weights.

    A published one that is not on this machine has a config.json, and no budgets of sparse prefill.

    Raises:
        ConfigError: see `published`.
    """
    preset = published(model, config)
    if preset is None:
        assert model is not None
        yield open_model(model, flags)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield open_model(
            presets.write(Path(scratch) / presets.PUBLISHED[preset].name, preset), flags
        )


def published(model: Path | None, config: str | None) -> str | None:
    """The key of `presets.PUBLISHED` of a published model that is named; None if MODEL has files.

    Args:
        model: a directory, a hub id or a published name; files on this machine come first.
        config: a published name.

    Raises:
        ConfigError: if there is none, or both, or no published model has the name.
    """
    if (model is None) == (config is None):
        raise ConfigError("give MODEL, a directory or a name, or --config NAME, and not both")
    if model is not None:
        return None if hub.is_local(model) else presets.find(str(model))
    preset = presets.find(str(config))
    if preset is None:
        raise ConfigError(not_one_of("--config", str(config), presets.NAMES))
    return preset


@expand
def plan(
    topology: Topology,
    load: LoadFlags,
    model: OptionalModel = None,
    config: PublishedModel = None,
    compile_programs: Annotated[
        bool,
        option("Also compile the programs for these devices (TPUs; minutes).", "--compile"),
    ] = False,
    json_output: Json = False,
):
    """Estimate memory and the longest context on a topology.

    Reads config.json alone: no weights and no such devices are needed. The numbers are
    computed from the sizes of arrays, for one sequence; --compile asks the compiler too.
    Exits with 1 if the prompt and answer do not fit.

    Examples:
        qwen-jax plan 7b-1m --topology v5e-16 --tokens 1M
        qwen-jax plan ckpt/7b-1m --topology v5e:4x4 --tokens 1010000 --compile
        qwen-jax plan ckpt/14b-1m --topology v5p:2x2x2 --mesh seq=2,tensor=4 --json
    """
    with opened_or_published(model, config, ModelFlags(slice=load.slice)) as opened:
        found = examine(
            opened,
            topology,
            load.tokens,
            load.mesh,
            load.dtype,
            memory=load.memory,
            compiled=compile_programs,
        )
    if published(model, config) is not None:
        found["model"] = config or str(model)
    if json_output:
        print(json.dumps(found))
    else:
        report(found)
    raise typer.Exit(0 if found["fits"] else 1)


def examine(
    opened: Model,
    name: str,
    tokens: int | None,
    mesh: str | None,
    dtype: str | None,
    *,
    sequences: int = 1,
    prefix_tokens: int = 0,
    memory: int | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Computes the output of `plan`, as a JSON object.

    Args:
        memory: bytes of a device, instead of the published figure.
        sequences: number of sequences in the cache at once, of `tokens` each.
        prefix_tokens: tokens of a prefix that all sequences share.
        compiled: also compile the programs.

    Raises:
        ConfigError: if a flag cannot be used with this model.
    """
    from qwen_jax.distributed import sharding
    from qwen_jax.engine import layout
    from qwen_jax.engine import memory as budget

    config, topology = opened.config, devices.topology(name)
    device = topology.device
    tokens = config.max_len if tokens is None else tokens
    if not 1 <= tokens < 2**31:
        raise ConfigError(f"--tokens {tokens} must be at least 1 and under 2^31")
    if tokens > config.max_len:
        note(f"{tokens:,} tokens are over the {config.max_len:,} that config.json declares")
    chosen = sharding.default_mesh(config, topology.count)
    shape = chosen if mesh is None else sharding.parse(mesh)
    sharding.check(config, shape, topology.count)
    slices = None if opened.options.slice is None else (opened.options.slice,)

    def load_of(tokens: int) -> budget.Workload:
        engine = layout.EngineConfig(
            max_len=tokens,
            max_seqs=sequences,
            slices=slices,
            sparse=opened.sparse,
            prefix_tokens=prefix_tokens,
        )
        return layout.load(
            config,
            engine,
            shape,
            platform=device.platform,
            relayouts_weights=device.relays,
            dtype=_precision(dtype, device, config),
        )

    load = load_of(tokens)
    taken = budget.memory(config, load, shape)
    limit = _limit(topology, memory)
    most = budget.longest(config, load_of, shape, limit)
    longest = min(most, config.max_len)
    flops = budget.prefill_flops(config, tokens), budget.decode_flops(config, tokens - 1)
    read = budget.decode_bytes(config, load, shape)
    replicas = topology.count // shape.data  # that share the work of a sequence
    found = _compiled(opened, load, topology, shape, limit) if compiled else []
    fits = taken.total <= limit and all(each["fits"] for each in found)
    return {
        "model": str(opened.directory),
        "num_parameters": budget.weights(config, sharding.MeshShape()),
        "dtype": load.dtype,
        "cache_bytes_per_token": config.kv_elements_per_token * load.itemsize,
        "topology": topology.name,
        "devices": topology.count,
        "device": dataclasses.asdict(device) | {"memory": limit},
        "mesh": dataclasses.asdict(shape),
        "mesh_reason": _reason(config, topology.count) if mesh is None else "as --mesh says",
        "tokens": tokens,
        "sequences": sequences,
        "slice": load.slice_len,
        "page": load.page,
        "sparse": load.columns is not None,
        "bytes": taken._asdict() | {"total": taken.total},
        "headroom": limit - taken.total,
        "fits": fits,
        "programs": found,
        "planned_per_peak": taken.total / max(each["peak"] for each in found) if found else None,
        "longest": longest,
        "longest_in_memory": most,
        "declared": config.max_len,
        "prefill_flops": flops[0],
        "decode_flops": flops[1],
        "least_prefill_seconds": device.flops and flops[0] / device.flops / replicas,
        "least_decode_seconds": device.bandwidth and read / device.bandwidth,
        "advice": []
        if fits
        else list(_advice(config, topology, load, shape, limit, longest))
        or ["devices with more memory"],
    }


def _compiled(
    opened: Model,
    load: "Workload",
    topology: devices.Topology,
    shape: "MeshShape",
    limit: int,
) -> list[dict[str, Any]]:
    """Compiles each step; returns its memory, collectives and refusal, as JSON objects."""
    import jax

    from qwen_jax.planner.aot import programs

    jax.config.update("jax_platforms", "cpu")  # this process leaves TPUs to others
    compile_cache.begin(False)  # programs for other devices cannot be read back
    budgets = opened.sparse if load.columns is not None else None
    found = []
    for each in programs(opened.config, load, topology, shape, budgets):
        note(f"compiled {each.name}")
        found.append(
            {
                "name": each.name,
                "arguments": each.arguments,
                "temporaries": each.temporaries,
                "peak": each.peak,
                "fits": not each.refusal and each.peak <= limit,
                "refusal": each.refusal or None,
                "sent": each.sent,
                "collectives": [
                    operation._asdict() | {"count": count}
                    for operation, count in sorted(
                        each.collectives.items(), key=lambda item: -item[0].sent * item[1]
                    )
                ],
            }
        )
    return found


def _limit(topology: devices.Topology, memory: int | None) -> int:
    """Returns the memory of a device in bytes: as given, else as published.

    Raises:
        ConfigError: if it is neither.
    """
    found = memory or topology.device.memory
    if found is None and topology.device.platform != "cpu":
        raise ConfigError(
            f"topology {topology.name!r}: give the memory of each device, as --memory 40GiB"
        )
    return found or devices.host_bytes() // topology.count


def _precision(dtype: str | None, device: devices.Device, config: ModelConfig) -> str:
    if dtype is not None:
        return {"f32": "float32", "bf16": "bfloat16"}[dtype]
    return "float32" if device.platform == "cpu" else config.compute_dtype


def _reason(config: ModelConfig, count: int) -> str:
    if count == 1:
        return "there is nothing to divide"
    return (
        f"the largest tensor that divides {count} devices, {config.num_heads} and "
        f"{config.num_kv_heads} heads and mlp; the rest is seq"
    )


def _advice(
    config: ModelConfig,
    topology: devices.Topology,
    load: "Workload",
    shape: "MeshShape",
    limit: int,
    longest: int,
):
    """Returns single changes after which the workload fits, each of them tried."""
    from qwen_jax.distributed import sharding
    from qwen_jax.engine import memory as budget

    def fits(mesh: "MeshShape" = shape, **changes: Any) -> bool:
        changed = dataclasses.replace(load, **changes)
        return budget.memory(config, changed, mesh).total <= limit

    chosen = sharding.default_mesh(config, topology.count)
    if chosen != shape and fits(chosen):
        yield f"leave out --mesh: {chosen} fits"
    if load.dtype == "float32" and fits(dtype="bfloat16"):
        yield "--dtype bf16"
    smaller = load.slice_len // 2
    while smaller >= _LEAST_SLICE and not fits(slice_len=smaller):
        smaller //= 2
    if smaller >= _LEAST_SLICE:
        yield f"--slice {smaller}: less is computed at a time"
    if longest:
        yield f"--tokens {longest}: a shorter context"
    for each in () if topology.device.platform == "cpu" else devices.larger(topology):
        mesh = sharding.default_mesh(config, each.count)
        if fits(mesh):
            yield f"--topology {each.name}: {each.count} devices as {mesh}"
            break


def report(found: dict[str, Any]) -> None:
    """Prints what `examine` found."""
    device, mesh = found["device"], found["mesh"]
    shape = ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"
    how = "votes of sparse prefill included" if found["sparse"] else "prefilled densely"
    at_once = f"{found['sequences']} at once of " if found["sequences"] > 1 else ""
    show(
        [
            (
                "model",
                f"{found['num_parameters']:,} parameters, {found['dtype']}, "
                f"{found['cache_bytes_per_token']:,} bytes of cache a token",
            ),
            (
                "devices",
                f"{found['topology']}: {found['devices']} of {_gib(device['memory'])} for programs",
            ),
            ("mesh", f"{shape}: {found['mesh_reason']}"),
            (
                "prompt",
                f"{at_once}{found['tokens']:,} tokens in slices of {found['slice']:,}, "
                f"pages of {found['page']:,}, {how}",
            ),
        ]
    )
    print("\nOn each device:")
    rows = [(f"  {name}", _gib(size)) for name, size in found["bytes"].items()]
    show([*rows, ("  headroom", _gib(found["headroom"]))], right=(1,))
    print()
    verdict = "fits" if found["fits"] else "does not fit"
    rows = [("verdict", f"{verdict}; {_longest(found)}")]
    if found["advice"]:
        rows += [
            ("or" if number else "change", text) for number, text in enumerate(found["advice"])
        ]
    if found["programs"]:
        rows += [("compiled", _agreement(found))]
    prefill = f"{_short(found['prefill_flops'] / 1e15)} PFLOP if dense"
    decode = f"{_short(found['decode_flops'] / 1e9)} GFLOP for the last token"
    if device["flops"]:
        prefill += f", at least {found['least_prefill_seconds']:,.1f} s at the published peak"
    if device["bandwidth"]:
        decode += f", at least {1e3 * found['least_decode_seconds']:,.1f} ms to read its memory"
    rows += [("prefill", prefill), ("decode", decode)]
    show(rows)
    for program in found["programs"]:
        _print_program(program)
    if device["platform"] == "gpu":
        print(
            "\njax takes 3/4 of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says more, such as .93"
        )


def _longest(found: dict[str, Any]) -> str:
    """Describes the longest context: what memory holds, and what the model declares."""
    most, declared = found["longest_in_memory"], found["declared"]
    if most <= declared:
        return f"the longest context that fits is {most:,} tokens"
    return (
        f"the longest context is the {declared:,} tokens that config.json declares "
        f"(memory would hold {most:,})"
    )


def _agreement(found: dict[str, Any]) -> str:
    peak = max(program["peak"] for program in found["programs"])
    return f"at most {_gib(peak)} at once; what is planned is {found['planned_per_peak']:.1%} of it"


def _print_program(program: dict[str, Any]) -> None:
    """Prints a compiled step."""
    if program["refusal"]:
        print(f"\n{program['name']}, refused by the compiler: {program['refusal']}")
        return
    print(
        f"\n{program['name']}: {_gib(program['arguments'])} of arguments, "
        f"{_gib(program['temporaries'])} beside them, {_gib(program['peak'])} at once; "
        f"a device sends {_mib(program['sent'])} a step"
    )
    show(
        [
            (
                "",
                f"{each['count']} x",
                each["kind"],
                each["axes"],
                each["shape"],
                _mib(each["sent"]),
            )
            for each in program["collectives"]
        ],
        right=(1, 5),
    )


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"
