"""Names of topologies, and the devices behind them."""

import json
from pathlib import Path

import pytest

import pallas_kernels
from pallas_kernels.dispatch.backend import CAPABILITIES
from qwen_jax.config import ConfigError
from qwen_jax.planner import devices

TUNED = Path(pallas_kernels.__file__).parent / "tuned"

NAMES = {
    # as people write it: (as we do, devices)
    "v5e:4x4": ("v5e:4x4", 16),
    "v5e-8": ("v5e:2x4", 8),
    "v5e:8": ("v5e:2x4", 8),
    "v5e": ("v5e:1x1", 1),
    "v6e-1": ("v6e:1x1", 1),
    "V6E-256": ("v6e:16x16", 256),
    "v5litepod-16": ("v5e:4x4", 16),
    "v5p-8": ("v5p:2x2x1", 4),
    "v5p-128": ("v5p:4x4x4", 64),
    "v4-32": ("v4:2x2x4", 16),
    "v4:4x4x12": ("v4:4x4x12", 192),
    "tpu7x-8": ("tpu7x:2x2x1", 8),
    "v7x:2x2x1": ("tpu7x:2x2x1", 8),
    "trillium:2x2": ("v6e:2x2", 4),
    "h200": ("h200:1", 1),
    "H100": ("h100:1", 1),
    "h100-80gb:8": ("h100:8", 8),
    "h200:8": ("h200:8", 8),
    "NVIDIA H200:16": ("h200:16", 16),
    "a100-80": ("a100-80:1", 1),
    "A100-40GB:4": ("a100-40:4", 4),
    "a100 80gb:8": ("a100-80:8", 8),
    "RTX-PRO-6000": ("rtxpro6000:1", 1),
    "rtx 6000 ada:2": ("rtx6000ada:2", 2),
    "gb200:12": ("gb200:12", 12),
    "gpu:8": ("gpu:8", 8),
    "cpu:13": ("cpu:13", 13),
    "cpu": ("cpu:1", 1),
}


@pytest.mark.parametrize("text", NAMES)
def test_a_topology_has_many_names(text):
    found = devices.topology(text)
    assert (found.name, found.count) == NAMES[text]
    assert devices.topology(found.name) == found


WRONG = {
    "": "there is no ''",
    "v5": "did you mean v5e or v5p?",
    "v5x:4x4": "v5e",
    "v55p:4x4x4": "did you mean v5p",
    "h20": "did you mean h200",
    "a100": "did you mean a100-40 or a100-80?",
    "a100:8": "did you mean a100-40 or a100-80?",
    "h300:8": "h100",
    "mi300x:8": "; There are v4, v5e",
    "h200-8": "did you mean h200:8?",
    "h200:0": "must have at least one device",
    "cpu:0": "must have at least one device",
    "h200:12": "several hosts have 8 GPUs each, so take 8 or 16",
    "gb200:6": "several hosts have 4 GPUs each, so take 4 or 8",
    "h200:2x4": "must give 1 sides of h200, such as h200:8",
    "v5e:4x4x4": "must give 2 sides of v5e, such as v5e:2x2",
    "v5e:3x3": "v5e has 1x1, 2x2, 2x4",
    "v5e:1x2": "v5e has 1x1, 2x2, 2x4",
    "v5e:12": "v5e has 1x1, 2x2, 2x4",
    "v5e-12": "v5e has v5e-1, v5e-4, v5e-8",
    "v5p": "v5p has 2x2x1",
    "v5p:8": "must give 3 sides of v5p, such as v5p:2x2x2",
    "v5p:2x2x3": "v5p has 2x2x1, 2x2x2",
    "v5p:0x4x4": "v5p has 2x2x1, 2x2x2",
    "v5p-6": "v5p has v5p-8, v5p-16",
    "v5p-9": "v5p has v5p-8, v5p-16",
    "v5e:4x4;rm": "there is no",
    "v5e:\x1b[2J": "there is no 'v5e:\\\\x1b[2j'",
    "v5e:٤x٤": "there is no",
    "h200:" + "9" * 5000: "there is no",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_means_no_topology_is_refused_with_the_way_out(text):
    with pytest.raises(ConfigError) as error:
        devices.topology(text)
    assert WRONG[text] in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 800


def test_larger_topologies_are_those_that_can_be_asked_for():
    for name, most in (("v5e:4x4", 256), ("v5p:2x2x1", 1 << 14), ("h200", 1 << 14)):
        found = list(devices.larger(devices.topology(name)))
        assert [each.chips for each in found] == [
            2**power for power in range(1, 15) if found[0].chips <= 2**power <= most
        ]
        assert [devices.topology(each.name) for each in found] == found


def test_every_device_with_tuned_tiles_is_known_once():
    known = [kind for device in devices.DEVICES.values() for kind in device.kinds]
    assert len(set(known)) == len(known)
    rows = [json.loads(path.read_text()) for path in TUNED.glob("*.json")]
    tuned = {kind for row in rows for each in row.values() for kind in each["device_kinds"]}
    assert tuned <= set(known)
    for kind in known:
        if kind.startswith("NVIDIA"):
            assert any(word in kind for word in CAPABILITIES)
