"""Output of doctor on this machine, and on others."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src import config as settings

from pallas_kernels.dispatch import backend
from qwen_jax.cli.doctor import missing
from qwen_jax.files import compile_cache
from qwen_jax.planner import devices


def test_doctor_tells_versions_devices_memory_disk_and_extras(run):
    code, out, _ = run("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["versions"]["jax"] == jax.__version__
    assert [device["kind"] for device in found["devices"]] == [d.device_kind for d in jax.devices()]
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert 0 < found["disk"]["free"] <= found["disk"]["total"]
    assert {"tpu", "cuda12", "cuda13"} <= found["extras"].keys()
    assert found["kernels"]["cpu"] == {"prefill": "xla", "decode": "xla", "select": "xla"}
    assert set(found["kernels"]["tpu v5e"].values()) == {"mosaic_tpu"}
    _, text, _ = run("doctor")
    assert re.search(r"^  tpu 7x +mosaic_tpu  mosaic_tpu  mosaic_tpu$", text, re.MULTILINE)
    assert f"jax {jax.__version__}" in text


def test_doctor_says_why_kernels_of_gpus_would_not_run(monkeypatch, run):
    module, first = "qwen_jax.cli.doctor", "no Triton kernels on a GPU: "
    second = "no Mosaic GPU kernels on a Hopper GPU: "
    monkeypatch.setattr(f"{module}.triton_fault", lambda: "triton is not installed")
    monkeypatch.setattr(f"{module}.mosaic_gpu_fault", lambda: "another jax")
    _, out, _ = run("doctor")
    assert f"{first}triton is not installed\n{second}another jax\n" in out
    monkeypatch.setattr(f"{module}.triton_fault", lambda: None)
    monkeypatch.setattr(f"{module}.mosaic_gpu_fault", lambda: None)
    _, out, _ = run("doctor")
    assert first not in out
    assert second not in out


def test_doctor_says_which_gpu_gets_which_kernels(monkeypatch, run):
    monkeypatch.setattr(backend, "triton_fault", lambda: None)
    monkeypatch.setattr(backend, "mosaic_gpu_fault", lambda: None)
    _, out, _ = run("doctor", "--json")
    kernels = json.loads(out)["kernels"]
    assert set(kernels["gpu h200"].values()) == {"mosaic_gpu"}
    assert set(kernels["gpu a100"].values()) == set(kernels["gpu b200"].values()) == {"triton"}


def test_an_extra_is_missing_what_its_packages_need(monkeypatch):
    requires = {
        "ours": ['jax[tpu]>=1; extra == "tpu"', "here; extra == 'test'", "numpy"],
        "jax": ['libtpu==0.1; extra == "tpu"', 'other; extra == "cuda"'],
    }

    def version(name):
        if name in ("jax", "here"):
            return "1"
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", requires.get)
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert missing("ours", "tpu") == ["libtpu"]
    assert missing("ours", "test") == []


def test_a_machine_without_a_device_is_told(monkeypatch, run):
    def refuse():
        raise RuntimeError("Unable to initialize backend 'tpu'\nmore")

    monkeypatch.setattr(jax, "devices", refuse)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    code, out, _ = run("doctor")
    assert code == 2
    first, *rest = out.splitlines()
    assert first == "not ready: jax finds no device: Unable to initialize backend 'tpu'"
    assert f"jax {jax.__version__}" in rest
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert (code, found["ready"], found["verdict"], found["devices"]) == (2, False, first, [])


def test_the_verdict_comes_first(monkeypatch, run):
    code, out, _ = run("doctor")
    count = len(jax.devices())
    named = f"{count} devices" if count > 1 else "1 device"
    kernels = "prefill xla, decode xla, select xla"
    assert (code, out.splitlines()[0]) == (0, f"ready: {named}, cpu, with {kernels}")
    monkeypatch.setattr(devices, "present", lambda platform: platform == "gpu")
    _, out, _ = run("doctor")
    assert out.splitlines()[0].endswith(
        "; an NVIDIA GPU may be here that jax does not see: pip install -e '.[cuda13]' in a "
        "checkout of qwen-jax"
    )


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable\x1b: 'x'. (set JAX_PL")])
@pytest.mark.parametrize(
    "arguments",
    [
        "generate MODEL --prompt a",
        "score MODEL --tokens IDS --out LOGITS",
        "calibrate MODEL --data IDS --out BUDGETS",
        "batch MODEL LINES ANSWERS --dry-run",
        "bench kernels",
    ],
)
def test_platforms_that_are_not_there_get_one_line(
    arguments, error, model, tmp_path, run, monkeypatch
):
    def refuse():
        raise error

    (tmp_path / "IDS").write_text("[1, 2, 3]")
    body = {"model": "m", "prompt": "ab", "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "LINES").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(jax, "devices", refuse)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    words = [
        model if word == "MODEL" else tmp_path / word if word.isupper() else word
        for word in arguments.split()
    ]
    code, _, err = run(*words)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: JAX_PLATFORMS=cuda names what is not here: ")
    assert last.endswith("; unset it, or set it to cpu")
    assert last.isprintable()
    assert "Traceback" not in err


def test_doctor_says_where_compiled_programs_are_and_how_large(tmp_path, run, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    with settings.enable_compilation_cache(True):
        compile_cache.write(tmp_path / "a.program", bytes(3 << 20))
        _, out, _ = run("doctor", "--json")
        assert json.loads(out)["compile_cache"] == {
            "directory": str(tmp_path),
            "bytes": (3 << 20) + 32,
            "limit": 4 << 30,
            "reason": "as JAX_COMPILATION_CACHE_DIR says",
        }
        _, out, _ = run("doctor")
        kept = f"3.0 MiB of at most 4.0 GiB in {tmp_path} (as JAX_COMPILATION_CACHE_DIR says)"
        assert f"compiled programs: {kept}\n" in out
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a.program"))
        _, out, _ = run("doctor")
        assert "compiled programs: not kept (the user's cache directory cannot be written" in out
    with settings.enable_compilation_cache(False):
        _, out, _ = run("doctor")
    assert "compiled programs: not kept (JAX_ENABLE_COMPILATION_CACHE turns it off)\n" in out


def test_the_first_word_of_a_command_is_its_own_and_libtpu_keeps_no_logs():
    """In a process whose environment says nothing of platforms.

    Logs of libtpu lie in one directory for all users of a machine; who cannot write there is told
    so in a hundred lines.
    """
    names = "TPU_", "JAX_PLATFORMS", "ALLOW_MULTIPLE_LIBTPU_LOAD"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    command = [sys.executable, "-m", "qwen_jax", "doctor"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=kept) as doctor:
        out, err = doctor.communicate()
    assert (doctor.returncode, err) == (0, "")
    assert out.startswith("ready: ")
    assert not list(Path("/tmp/tpu_logs").glob(f"*.{doctor.pid}"))


def test_what_the_environment_says_of_tpus_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "mine"})
    monkeypatch.setattr(devices, "present", lambda platform: True)
    devices.quiet_libtpu()
    assert os.environ == {"TPU_WORKER_HOSTNAMES": "mine"}
    monkeypatch.setattr(devices, "present", lambda platform: False)
    devices.quiet_libtpu()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
