"""doctor: report on installed packages, devices and missing extras."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.backend import choose, preferences
from pallas_kernels.dispatch.versions import mosaic_gpu_fault, triton_fault
from qwen_jax.cli.flags import Json, option
from qwen_jax.config import ConfigError
from qwen_jax.files import compile_cache
from qwen_jax.files.reading import printable, shown
from qwen_jax.models.presets import NAMES
from qwen_jax.planner import devices

INSTALL = "pip install -e '.[{}]' in a checkout of qwen-jax"
"""Command that installs an extra, whose name replaces `{}`."""
_OF_A_CHECKOUT = "demo", "dev", "docs", "test"  # extras of what a wheel does not hold
_PACKAGES = (
    "qwen-jax jax jaxlib flax orbax-checkpoint numpy safetensors tokenizers libtpu "
    "jax-cuda12-plugin jax-cuda13-plugin jax-triton triton torch"
).split()


def doctor(
    about: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KERNELS|MODEL",
            help="With --kernels: which ones, and a checkpoint that has the shapes.",
            show_default=False,
        ),
    ] = None,
    kernels: Annotated[
        bool, option("Compare attention kernels with the truth here and time them.", "--kernels")
    ] = False,
    config: Annotated[
        str | None,
        option(
            f"With --kernels: a published model that has the shapes, of {', '.join(NAMES)}; "
            "the first of these.",
            metavar="NAME",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        option("With --kernels: write it all into one JSON, for a bug report.", metavar="FILE"),
    ] = None,
    json_output: Json = False,
):
    """Show versions, devices, kernels, memory, disk and missing extras.

    The first line says what a model would run on here, or what is missing; in that case the
    exit code is 2.

    Examples:
        qwen-jax doctor
        qwen-jax doctor --json
        qwen-jax doctor --kernels --report kernels.json
        qwen-jax doctor --kernels triton xla --config 14b-1m
    """
    if kernels:
        _show_kernels(about or [], config, report, json_output)
    for name, value in (("--config", config), ("--report", report), ("KERNELS", about)):
        if value:
            raise ConfigError(f"{name} has no effect without --kernels: add it")
    found = examine()
    if json_output:
        print(json.dumps(found))
    else:
        show(found)
    if not found["ready"]:
        raise typer.Exit(2)


def show(found: dict[str, Any]) -> None:
    """Prints what `examine` found, the verdict first."""
    print(found["verdict"])
    print(f"Python {found['python']} on {found['system']}")
    for name, version in found["versions"].items():
        print(f"{name} {version or '(not installed)'}")
    for device in found["devices"]:
        memory = device["memory_bytes"]
        print(f"device {device['id']}: {device['kind']}{f', {_gib(memory)}' if memory else ''}")
    cache = found["compile_cache"]
    kept = "not kept"
    if cache["directory"]:
        most = f" of at most {_gib(cache['limit'])}" if cache["limit"] is not None else ""
        size = f"{_gib(cache['bytes'])}{most} " if cache["bytes"] is not None else ""
        kept = f"{size}in {shown(cache['directory'])}"
    print(f"compiled programs: {kept} ({cache['reason']})")
    print(f"{'kernels of':17}" + "".join(f"{name:12}" for name in found["kernels"]["cpu"]))
    for kind, names in found["kernels"].items():
        print((f"  {kind:15}" + "".join(f"{name:12}" for name in names.values())).rstrip())
    if found["triton_fault"]:
        print(f"no Triton kernels on a GPU: {found['triton_fault']}")
    if found["mosaic_gpu_fault"]:
        print(f"no Mosaic GPU kernels on a Hopper GPU: {found['mosaic_gpu_fault']}")
    print(f"memory: {_gib(found['memory']['available'])} of {_gib(found['memory']['total'])} free")
    print(f"disk here: {_gib(found['disk']['free'])} of {_gib(found['disk']['total'])} free")
    for extra, missing in found["extras"].items():
        hint = f"missing {', '.join(missing)}: {INSTALL.format(extra)}"
        print(f"extra {extra}: {hint if missing else 'installed'}")


def _show_kernels(about: list[str], config: str | None, report: Path | None, json: bool) -> None:
    devices.found()
    from qwen_jax.cli import kernel_report  # imports jax, for which `doctor` alone should not fail

    models = [Path(each) for each in about if each not in backend.NAMES]
    if len(models) > 1:
        raise ConfigError(
            f"{printable(models[0])} and {printable(models[1])} are no kernels "
            f"({', '.join(backend.NAMES)}), and only one checkpoint can have the shapes"
        )
    code = kernel_report.show(
        [each for each in about if each in backend.NAMES],
        model=models[0] if models else None,
        config=config,
        report=report,
        facts=examine,
        json_output=json,
    )
    raise typer.Exit(code)


def examine() -> dict[str, Any]:
    """Collects the output of `doctor`, as a JSON object."""
    there, device_error = _devices()
    verdict = f"not ready: {device_error}" if device_error else _verdict(there)
    disk = shutil.disk_usage(Path.cwd())
    return {
        "ready": device_error is None,
        "verdict": verdict,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": there,
        "device_error": device_error,
        "kernels": {kind: each._asdict() for kind, each in preferences().items()},
        "triton_fault": triton_fault(),
        "mosaic_gpu_fault": mosaic_gpu_fault(),
        "compile_cache": compile_cache.describe(),
        "memory": {
            "total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "available": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"),
        },
        "disk": {"total": disk.total, "free": disk.free},
        "extras": {
            extra: missing("qwen-jax", extra)
            for extra in importlib.metadata.metadata("qwen-jax").get_all("Provides-Extra") or ()
            if extra not in _OF_A_CHECKOUT
        },
    }


def missing(package: str, extra: str) -> list[str]:
    """Returns packages required by an extra of an installed package that are not installed."""
    absent = []
    for requirement in importlib.metadata.requires(package) or ():
        if not re.search(rf"""extra == ['"]{re.escape(extra)}['"]""", requirement):
            continue
        name, inner = re.findall(r"^([\w.-]+)(?:\[([\w.,-]+)\])?", requirement)[0]
        if _version(name) is None:
            absent.append(name)
        elif inner:
            absent += [each for part in inner.split(",") for each in missing(name, part)]
    return absent


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> tuple[list[dict[str, Any]], str | None]:
    """Returns the devices that JAX finds, or [] and the reason."""
    try:
        found = devices.found()
    except ConfigError as error:
        return [], str(error)
    return [
        {
            "id": device.id,
            "platform": device.platform,
            "kind": device.device_kind,
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        }
        for device in found
    ], None


def _verdict(there: list[dict[str, Any]]) -> str:
    """Describes the devices and kernels that a model would use, and devices JAX does not find."""
    first = there[0]
    kernels = choose(first["platform"], kind=first["kind"])
    count = f"{len(there)} devices" if len(there) > 1 else "1 device"
    text = f"ready: {count}, {printable(first['kind'])}, with {kernels}"
    for unseen, extra, name in (("tpu", "tpu", "a TPU"), ("gpu", "cuda13", "an NVIDIA GPU")):
        if first["platform"] == "cpu" and devices.present(unseen):
            text += f"; {name} may be here that jax does not see: {INSTALL.format(extra)}"
    if first["platform"] == "gpu" and "xla" in kernels:
        text += f"; no faster kernels: {triton_fault() or mosaic_gpu_fault()}"
    return text


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
