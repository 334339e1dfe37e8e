"""One layout for the engine, the planner and the check before a run."""

import bisect
import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import scaling

from qwen_jax.cli import plan
from qwen_jax.cli.flags import ModelFlags
from qwen_jax.config import ConfigError
from qwen_jax.distributed import sharding
from qwen_jax.distributed.sharding import MeshShape
from qwen_jax.engine.layout import EngineConfig, EngineLayout
from qwen_jax.llm import placement
from qwen_jax.llm.model import open_model
from qwen_jax.models import presets
from qwen_jax.planner import devices

MODELS = {"7b": (28, 28), "14b": (48, 40)}  # layers and heads
MESHES = {
    # chips by the number of sides of a topology: meshes of its devices
    1: {"1": ["seq=1"], "8": ["seq=8", "seq=2,tensor=4", "seq=2,tensor=2,data=2"]},
    2: {"1x1": ["seq=1"], "2x4": ["seq=8", "seq=2,tensor=4", "seq=2,tensor=2,data=2"]},
    3: {"2x2x1": ["seq=4", "tensor=4", "data=4"], "2x2x2": ["seq=2,tensor=4"]},
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The published models, with budgets of sparse prefill and without."""
    found = {}
    for name, (layers, heads) in MODELS.items():
        directory = presets.write(tmp_path_factory.mktemp(name), name)
        row = {str(head): ["vertical_and_slash", 1000, 6096, 1.0] for head in range(heads)}
        path = directory / "sparse_attention_config.json"
        path.write_text(json.dumps([row] * layers))
        for sparse in ("auto", "off"):
            found[name, sparse] = open_model(directory, ModelFlags(sparse=sparse))
    return found


def mesh_of(kind: str, shape: MeshShape, memory: int):
    """A mesh of devices as jax shows them, with so many bytes each."""
    device = devices.DEVICES[kind]
    each = SimpleNamespace(
        platform=device.platform,
        device_kind=device.kinds[-1] if device.kinds else kind,
        memory_stats=lambda: {"bytes_limit": memory},
    )
    sizes = {axis: getattr(shape, axis) for axis in sharding.AXES}
    return SimpleNamespace(shape=sizes, devices=np.array([each] * shape.size), size=shape.size)


def holds(kind, shape, memory, monkeypatch, *arguments):
    """Returns True if devices with so many bytes pass the check of memory before a run."""
    monkeypatch.setattr(devices, "host_bytes", lambda: memory * shape.size)
    try:
        placement.check_memory(*arguments, mesh_of(kind, shape, memory))
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("kind", devices.DEVICES)
def test_a_run_is_refused_at_a_byte_less_than_what_the_planner_says(kind, opened, monkeypatch):
    device = devices.DEVICES[kind]
    meshes = [(size, mesh) for size, several in MESHES[device.dims].items() for mesh in several]
    loads = [(1_010_000, 1, 0), (5000, 3, 3000)]
    if kind not in ("v5e", "v5p", "tpu7x", "h200", "cpu"):  # others differ from these in figures
        meshes, loads = meshes[-1:], loads[:1]
    for ((_, sparse), model), (size, text), load in itertools.product(
        opened.items(), meshes, loads
    ):
        shape = sharding.parse(text)
        shape = dataclasses.replace(shape, data=shape.data * device.per_chip)
        tokens, sequences, held = load
        more = {"sequences": sequences, "prefix_tokens": held, "memory": 1 << 37}
        found = plan.examine(model, f"{kind}:{size}", tokens, str(shape), None, **more)
        assert found["sparse"] == (sparse == "auto" and tokens > 32768)
        engine = EngineConfig(
            max_len=tokens, max_seqs=sequences, prefix_tokens=held, sparse=model.sparse
        )
        run = model.config, engine, found["dtype"]
        total = found["bytes"]["total"]
        assert holds(kind, shape, total, monkeypatch, *run)
        assert not holds(kind, shape, total - 1, monkeypatch, *run)


def test_matrices_that_are_laid_out_anew_are_counted_before_a_run(opened, monkeypatch):
    """2.8 GiB of 7B on four chips of TPU7x."""
    shape = MeshShape(tensor=4)
    run = opened["7b", "off"].config, EngineConfig(max_len=1000), "bfloat16"
    least = {
        kind: bisect.bisect_left(
            range(1 << 40), True, key=lambda size: holds(kind, shape, size, monkeypatch, *run)
        )
        for kind in ("tpu7x", "v5p")
    }
    more = 2 * 28 * (28 * 128 * 3584 + 3 * 3584 * 18944) // 4
    assert least["tpu7x"] == least["v5p"] + more


@pytest.mark.parametrize(
    ("max_len", "max_seqs", "held"), [(1, 1, 0), (1025, 4, 0), (3000, 4, 1500), (3000, 2, 2048)]
)
def test_pages_of_the_cache_are_those_of_every_sequence(max_len, max_seqs, held, opened):
    """Each sequence ends in a page of its own; held pages are shared as far as they are full."""
    engine = EngineConfig(max_len=max_len, max_seqs=max_seqs, prefix_tokens=held)
    found = EngineLayout.resolve(opened["7b", "off"].config, engine, platform="tpu")
    own = -(-max_len // found.page) - held // found.page
    assert found.num_pages == max_seqs * own + -(-held // found.page) + 1
    assert found.table_len == -(-max_len // found.page)


@pytest.mark.parametrize(("name", "where", "tokens"), scaling.CASES)
def test_what_is_compiled_for_the_docs_is_what_an_engine_runs(name, where, tokens, opened):
    config = opened[name, "off"].config
    mesh = sharding.default_mesh(config, devices.topology(where).count)
    load = scaling.load(name, mesh, tokens, sparse=True)
    engine = EngineConfig(max_len=tokens, sparse=scaling.budgets(name))
    found = EngineLayout.resolve(config, engine, platform="tpu", seq=mesh.seq)
    assert (load.page, load.slice_len, load.columns) == (found.page, found.slice_len, found.columns)
    assert (load.pages, load.cache_pages) == (found.table_len, found.num_pages - 1)
    assert load.columns == min(scaling.COLUMNS[name], found.table_len * found.page)
