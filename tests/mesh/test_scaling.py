"""docs/scaling.md says what its data say, and these agree with the planner's arithmetic."""

import json

import pytest
import scaling

from qwen_jax.distributed.sharding import MeshShape
from qwen_jax.engine import memory as budget
from qwen_jax.models.presets import PUBLISHED
from qwen_jax.planner import roofline
from qwen_jax.planner.devices import topology

FOUND = json.loads((scaling.DOCS / "scaling.json").read_text())


def asked(each):
    """Model, load and mesh of a program that was compiled."""
    mesh, device = MeshShape(**each["mesh"]), topology(each["topology"]).device
    sparse = each["step"] == "prefill_sparse"
    load = scaling.load(
        each["model"], mesh, each["tokens"], sparse=sparse, relayouts_weights=device.relays
    )
    return scaling.model(each["model"]), load, mesh


def test_every_case_was_compiled_and_fits():
    steps = [(each["model"], each["topology"], each["tokens"], each["step"]) for each in FOUND]
    assert steps == [
        (*case, step) for case in scaling.CASES for step in ("prefill", "prefill_sparse", "decode")
    ]
    for each in FOUND:
        assert each["peak"] <= topology(each["topology"]).device.memory


@pytest.mark.parametrize("each", FOUND, ids=lambda each: f"{each['topology']}-{each['step']}")
def test_the_planner_agrees_with_the_compiler(each):
    planned = budget.memory(*asked(each)).total
    if each["step"] == "decode":
        assert each["peak"] <= planned
    else:
        assert planned == pytest.approx(each["peak"], rel=0.1)
        assert roofline.slice_sent(*asked(each)) == pytest.approx(each["sent"], rel=2e-3)


def test_the_page_is_what_the_script_makes_of_the_data():
    text = (scaling.DOCS / "scaling.md").read_text()
    assert scaling.filled(text, FOUND) == text


@pytest.mark.parametrize("name", PUBLISHED)
def test_moving_keys_costs_as_much_as_there_are_keys(name):
    config = scaling.model(name)
    mesh = MeshShape(seq=4)
    short, long = (scaling.load(name, mesh, tokens, sparse=False) for tokens in (1 << 20, 1 << 21))
    more = roofline.gathered_sent(config, long, mesh) - roofline.gathered_sent(config, short, mesh)
    # Keys and values of all layers but the last, in bfloat16, to three devices from each.
    layers, heads = config.num_layers - 1, config.num_kv_heads
    assert more == 2 * 2 * layers * heads * config.head_dim * (1 << 20) / 4 * 3
    assert roofline.slice_sent(config, long, mesh) == roofline.slice_sent(config, short, mesh)
    # One device sends nothing, whatever moves.
    assert roofline.slice_sent(config, long, MeshShape()) == 0
    assert roofline.gathered_sent(config, long, MeshShape()) == 0


def test_a_token_costs_what_it_costs_by_hand():
    config, mesh = scaling.model("7b"), MeshShape(seq=4, tensor=4)
    load = scaling.load("7b", mesh, 1 << 20, sparse=False)
    cost = roofline.of_slice(config, load, mesh)
    keys = (1 << 20) - load.slice_len / 2
    block = 3584 * (2 * 28 * 128 + 2 * 4 * 128 + 3 * 18944)
    assert cost.flops == 27 * load.slice_len * (2 * block + 4 * 28 * 128 * keys) / 16
    sparse = roofline.of_slice(config, load, mesh, keys=1e4)
    assert sparse.flops == 27 * load.slice_len * (2 * block + 4 * 28 * 128 * 1e4) / 16
    step = roofline.of_token(config, load, mesh)
    assert step.memory == budget.decode_bytes(config, load, mesh)
