"""What doctor says of this machine, and of others."""

import importlib.metadata
import json
import re

import jax

from pallas_kernels import backend
from qwen_jax.cli.doctor import missing


def test_doctor_tells_versions_devices_memory_disk_and_extras(run):
    code, out, _ = run("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["versions"]["jax"] == jax.__version__
    assert [device["kind"] for device in found["devices"]] == [d.device_kind for d in jax.devices()]
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert 0 < found["disk"]["free"] <= found["disk"]["total"]
    assert {"tpu", "cuda12", "cuda13", "test"} <= found["extras"].keys()
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
    code, out, _ = run("doctor")
    assert code == 0
    assert "no device: Unable to initialize backend 'tpu'\n" in out
