"""--mesh: the same answers on other devices, and one line where there is no such mesh."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from support import children

from qwen_jax.cli import main
from qwen_jax.distributed import sharding
from qwen_jax.llm import placement
from qwen_jax.models.configs import model_config

PROMPT = ["--prompt", "The bee and the bear", "--greedy", "--max-new-tokens", "4", "--json"]


def test_verbs_run_on_meshes_of_virtual_devices(tiny):
    children.run(use_meshes, str(tiny))


def use_meshes(directory):
    found = {}
    # The first makes the devices of this process.
    for mesh, devices in {
        "data=2,tensor=2": "2 replicas, each cpu, 2 devices as tensor=2; ",
        None: "cpu, 1 device; ",
    }.items():
        flag = [] if mesh is None else ["--mesh", mesh]
        code, out, err = run("generate", directory, *PROMPT, *flag)
        assert (code, err.count("\n")) == (0, 1), err
        assert err.startswith(devices), err
        found[mesh] = json.loads(out)["token_ids"]
    assert len(jax.devices()) == 4
    assert found["data=2,tensor=2"] == found[None]
    heads = json.loads(Path(directory, "config.json").read_text())["num_key_value_heads"]
    for mesh, fault in {
        "tensor=4": f"tensor=4 does not divide num_kv_heads={heads}",
        "seq=2": "mesh seq=2,tensor=1 has 2 devices, there are 4",
    }.items():
        code, out, err = run("generate", directory, *PROMPT, "--mesh", mesh)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert fault in err


def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("platform", "count", "wanted", "shape"),
    [
        ("tpu", 8, None, {"data": 1, "seq": 4, "tensor": 2}),
        ("tpu", 8, "tensor=2,data=4", {"data": 4, "seq": 1, "tensor": 2}),
        ("tpu", 8, "seq=1", None),
        ("gpu", 1, None, None),
        ("cpu", 8, None, None),
    ],
)
def test_all_accelerators_are_used_unless_the_flag_says_less(
    tiny, monkeypatch, platform, count, wanted, shape
):
    assert jax.devices()  # in use: no flag makes more
    devices = [SimpleNamespace(platform=platform)] * count
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(sharding, "make_mesh", lambda found, **axes: (found, axes))
    mesh = placement.mesh(model_config(tiny), wanted)
    assert mesh == (shape and (devices, shape))


def test_weights_that_no_device_holds_are_refused_before_they_are_read(tiny, monkeypatch, run):
    monkeypatch.setattr("qwen_jax.planner.devices.host_bytes", lambda: 1 << 16)
    monkeypatch.setattr("convert.weights.load", None)
    for arguments in ["eval", "passkey", tiny, "--lengths", "1k"], ["generate", tiny, *PROMPT]:
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: weights and a cache of ")
        assert "GiB on the device, which has 0.00 GiB: `qwen-jax plan`" in err
