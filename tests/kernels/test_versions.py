"""Which releases of jax, jax-triton and Triton run together, which GPUs, and what is said else."""

import importlib.metadata
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dispatch import backend, versions
from pallas_kernels.dispatch.backend import Device, Unsupported
from pallas_kernels.triton import call


@pytest.fixture
def installed(monkeypatch):
    """Says which releases are installed."""
    found = {}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return found


@pytest.mark.parametrize(
    ("jax_version", "jax_triton", "triton"),
    [
        ("0.10.2", "0.3.1", "3.6.0"),
        ("0.11.2", "0.3.1", "3.6.0"),
        ("0.11.2", "0.4.1", "3.7.1"),
        ("0.11.2.dev3", "0.3.1", "3.6.0+git1"),
    ],
)
def test_releases_that_were_tested_together_run(installed, jax_version, jax_triton, triton):
    installed.update({"jax": jax_version, "jax-triton": jax_triton, "triton": triton})
    assert versions.triton_fault() is None


@pytest.mark.parametrize(
    ("jax_version", "jax_triton", "triton"),
    [
        ("0.12.0.1", "0.4.1", "3.7.1"),
        ("0.12.0", "0.3.1", "3.6.0"),
        ("0.10.1", "0.3.1", "3.6.0"),
        ("0.10.2", "0.4.1", "3.7.1"),
        ("0.11.2", "0.4.1", "3.6.0"),
        ("0.11.2", "0.3.1", "3.7.0"),
    ],
)
def test_other_releases_are_named_with_those_that_do(installed, jax_version, jax_triton, triton):
    installed.update({"jax": jax_version, "jax-triton": jax_triton, "triton": triton})
    assert versions.triton_fault() == (
        f"jax {jax_version}, jax-triton {jax_triton}, triton {triton} do not work together: "
        "pip install 'jax>=0.10.2,<0.12' jax-triton==0.3.1 triton==3.6.0"
    )


@pytest.mark.parametrize("package", ["jax-triton", "triton"])
def test_a_package_that_is_not_there_is_named(installed, package):
    installed.update({"jax": "0.11.2", "jax-triton": "0.3.1", "triton": "3.6.0"})
    del installed[package]
    fault = versions.triton_fault()
    assert fault == f"{package} is not installed: pip install {versions.PINS}"


def test_a_kernel_is_refused_where_the_packages_do_not_work(installed):
    installed["jax"] = "0.11.2"
    with pytest.raises(Unsupported, match=r"^jax-triton is not installed"):
        call.launch(None, jnp.zeros(1), outputs=[], grid=(1,), num_warps=4, num_stages=1)


def on(monkeypatch, kind, *present):
    monkeypatch.setattr(backend, "device", lambda: Device("gpu", kind))
    devices = [types.SimpleNamespace(device_kind=k, compute_capability=c) for k, c in present]
    monkeypatch.setattr(jax, "devices", lambda: devices)


def test_the_capability_is_that_of_the_gpu_or_of_its_name(monkeypatch):
    on(monkeypatch, "NVIDIA Nameless", ("NVIDIA Nameless", "12.0"))
    assert call.capability() == 120
    for kind, expected in {
        "NVIDIA H200": 90,
        "NVIDIA H100 80GB HBM3": 90,
        "NVIDIA GH200 480GB": 90,
        "NVIDIA A100-SXM4-80GB": 80,
        "NVIDIA A10": 86,
        "NVIDIA L40S": 89,
        "NVIDIA L4": 89,
        "NVIDIA GeForce RTX 4090": 89,
    }.items():
        on(monkeypatch, kind)
        assert call.capability() == expected


def test_a_gpu_that_is_too_old_or_unknown_is_refused(monkeypatch):
    on(monkeypatch, "Tesla T4", ("Tesla T4", "7.5"))
    with pytest.raises(Unsupported, match=r"^Tesla T4 has compute capability 7\.5; .* need 8\.0$"):
        call.capability()
    on(monkeypatch, "Tesla T4")
    with pytest.raises(Unsupported, match=r"no compute capability is known of .Tesla T4."):
        call.capability()


def test_mosaic_gpu_runs_with_releases_of_jax_that_were_tried(installed):
    for release in ("0.10.2", "0.11.2", "0.11.2.dev3"):
        installed["jax"] = release
        assert versions.mosaic_gpu_fault() is None
    installed["jax"] = "0.12.0"
    assert versions.mosaic_gpu_fault() == (
        "its kernels were tested with jax 0.10.2 and 0.11.2, not 0.12.0"
    )


def test_mosaic_gpu_runs_on_hopper_alone(installed, monkeypatch):
    installed["jax"] = "0.11.2"
    on(monkeypatch, "NVIDIA H200")
    assert backend.choose("gpu", "mosaic_gpu").prefill == "mosaic_gpu"
    assert set(backend.choose("gpu")) == {"mosaic_gpu"}
    for other, reason in {
        ("head_dim", 64): "heads of 64, where decode takes 128",
        ("dtype", "float32"): "float32, where it takes bfloat16",
    }.items():
        assert backend.unavailable("mosaic_gpu", **dict([other])) == reason
        assert "mosaic_gpu" not in backend.choose("gpu", **dict([other]))
    for kind, reason in {
        "NVIDIA B200": "NVIDIA B200 has compute capability 10.0; its kernels are for 9.0",
        "NVIDIA Nameless": "no compute capability is known of 'NVIDIA Nameless'",
    }.items():
        on(monkeypatch, kind)
        with pytest.raises(Unsupported, match=f"^backend 'mosaic_gpu': {reason}"):
            backend.choose("gpu", "mosaic_gpu")
        assert "mosaic_gpu" not in backend.choose("gpu")
    installed["jax"] = "0.12.0"
    on(monkeypatch, "NVIDIA H200")
    assert backend.unavailable("mosaic_gpu") == versions.mosaic_gpu_fault()
    assert "mosaic_gpu" not in backend.choose("gpu")
