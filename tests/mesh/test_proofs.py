"""A million tokens and more fit on these TPUs, says their compiler, and nothing else is sent."""

import math
import re
from collections import Counter

import pytest
from hlo import sizes
from scaling import CASES, COLUMNS, SLICE

from qwen_jax.config import SparseConfig
from qwen_jax.distributed import sharding
from qwen_jax.engine import layout
from qwen_jax.engine import memory as budget
from qwen_jax.models import presets
from qwen_jax.planner import aot, devices

pytestmark = pytest.mark.optimized

pytest.importorskip("libtpu", reason="the TPU compiler (pip install libtpu) is not installed")

SMALL = 1 << 16  # elements: more than a token has, less than the part of a slice


def budgets(config, name):
    row = (COLUMNS[name],) * config.num_heads, (8192,) * config.num_heads
    vertical, slash = ((each,) * config.num_layers for each in row)
    return SparseConfig(vertical=vertical, slash=slash, last_q=64)


def large(found):
    """Kind, axes and elements of what is no trifle, with how often."""
    counted = Counter()
    for each, count in found.items():
        dims = re.findall(r"\[([\d,]*)\]", each.shape)
        elements = sum(math.prod(map(int, each.split(","))) for each in dims if each)
        if elements >= SMALL:
            counted[each.kind, each.axes, elements] += count
    return counted


def stated(config, load, shape, step):
    """The same, as `spread` has it for attention and tensor parallelism for the rest."""
    L, D, H = config.num_layers, config.embed_dim, config.head_dim
    t = load.slice_len // shape.seq
    n, k = config.num_heads // shape.tensor, config.num_kv_heads // shape.tensor
    found = Counter()
    if shape.tensor > 1:
        # Output and MLP of every layer but the last, which has one token, and the embedding.
        found["all-reduce", "tensor", t * D] += 2 * (L - 1) + 1
    if shape.seq > 1:
        found["all-gather", "seq", t * n * H] += L - 1  # queries
        found["all-gather", "seq", t * k * H] += 2 * L  # keys and values
        found["all-to-all", "seq", shape.seq * t * n * H] += L - 1  # what was found
        found["all-to-all", "seq", shape.seq * t * n] += L - 1  # its log-sum-exp
        if step == "prefill_sparse":
            found["all-gather", "seq", n * load.pages * load.page // shape.seq] += L - 1  # slashes
            found["collective-permute", "seq", n * load.pages * 128] += L - 1  # votes that reach on
    return Counter({key: count for key, count in found.items() if key[2] >= SMALL})


@pytest.mark.tpu_aot
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("step", ["prefill", "prefill_sparse", "decode"])
@pytest.mark.parametrize(("model", "name", "tokens"), CASES)
def test_it_fits_as_planned_and_nothing_else_is_sent(model, name, tokens, step, tmp_path):
    config, topology = presets.config(tmp_path, model), devices.topology(name)
    shape = sharding.default_mesh(config, topology.count)
    kept = budgets(config, model)
    sparse = kept if step == "prefill_sparse" else None
    load = layout.load(
        config,
        layout.EngineConfig(max_len=tokens, slices=(SLICE,), sparse=sparse),
        shape,
        platform="tpu",
        relayouts_weights=topology.device.relays,
        dtype="bfloat16",
    )
    mesh = aot.mesh_of(topology, shape)
    made = aot.steps(config, load, mesh, kept)[step]()

    assert not made.refusal
    assert made.peak <= topology.device.memory
    planned = budget.memory(config, load, shape).total
    if step == "decode":
        assert made.peak <= planned
    else:
        assert made.peak == pytest.approx(planned, rel=0.1)

    # The cache is written in place: no part of it, and none of one of its layers, is copied.
    layer = config.num_kv_heads // shape.tensor * (load.pages + 1) * load.page // shape.seq
    layer *= config.head_dim
    assert made.overwritten >= 2 * 2 * config.num_layers * layer
    assert not sizes(made.text, "copy", "copy-start", "transpose") & {
        layer,
        layer * config.num_layers,
    }
    assert layer not in sizes(made.text)

    assert all(each.put < 2 * config.num_layers * layer for each in made.collectives)
    assert large(without_logits(made.collectives, config, shape)) == (
        stated(config, load, shape, step) if step != "decode" else Counter()
    )
    # What else there is concerns one token, or a few numbers for each head and page.
    of_large = sum(
        each.sent * count for each, count in made.collectives.items() if large({each: 1})
    )
    assert made.sent - of_large <= max(1 << 24, made.sent // 32)


def without_logits(found, config, shape):
    """All but a few that concern the logits of one token."""
    whole, part = config.vocab_size, config.vocab_size // shape.tensor
    logits = {
        each: count
        for each, count in found.items()
        if each.axes == "tensor" and re.match(rf"\w+\[(1,)*({whole}|{part})\]", each.shape)
    }
    assert sum(logits.values()) <= 8
    return {each: count for each, count in found.items() if each not in logits}


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused_by_the_compiler_too(tmp_path):
    config, topology = presets.config(tmp_path, "7b"), devices.topology("v5e:1x1")
    load = budget.Workload(tokens=SLICE, page=1024, slice_len=SLICE)
    shape = sharding.MeshShape()
    made = aot.steps(config, load, aot.mesh_of(topology, shape))["prefill"]()
    assert "available HBM" in made.refusal
    assert made.peak > topology.device.memory
    assert made.peak == pytest.approx(budget.memory(config, load, shape).total, rel=0.1)


@pytest.mark.parametrize("mesh", ["seq=2,tensor=8", "data=2,tensor=8", "seq=8,tensor=2"])
def test_an_axis_may_take_a_part_of_a_side_of_the_topology(mesh):
    shape = sharding.parse(mesh)
    found = aot.mesh_of(devices.topology("v6e:4x4"), shape)
    assert dict(found.shape) == {"data": 1, "seq": shape.seq, "tensor": shape.tensor}
    places = {tuple(device.coords) for device in found.devices.flat}
    assert len(places) == shape.seq * shape.tensor
