"""Meshes, what lies where on them, and weights loaded straight to their shards."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import Tiny
from support.children import run
from support.random_models import CONFIGS

from convert import weights
from qwen_jax.config import ConfigError
from qwen_jax.distributed import sharding
from qwen_jax.distributed.sharding import MeshShape, Rules
from qwen_jax.engine import memory
from qwen_jax.models import kv_cache, params, presets
from qwen_jax.models.configs import model_config


@pytest.mark.parametrize(
    ("name", "tensor"), [("7b", (1, 2, 4, 4, 4, 4, 4, 4, 4)), ("14b", (1, 2, 4, 8, 8, 8, 8, 8, 8))]
)
def test_published_models_run_on_every_power_of_two(name, tensor, tmp_path):
    config = presets.config(tmp_path, name)
    for power, expected in enumerate(tensor):
        shape = sharding.default_mesh(config, 2**power)
        assert (shape.tensor, shape.seq, shape.data) == (expected, 2**power // expected, 1)
        sharding.check(config, shape, 2**power)


@given(
    kv_heads=st.integers(1, 12),
    group=st.integers(1, 8),
    mlp=st.integers(1, 200),
    vocab=st.integers(1, 200),
    count=st.integers(1, 300),
)
def test_tensor_is_the_largest_divisor_of_all(kv_heads, group, mlp, vocab, count):
    config = dataclasses.replace(
        next(iter(CONFIGS.values())),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        mlp_dim=mlp,
        vocab_size=vocab,
    )
    shape = sharding.default_mesh(config, count)
    sharding.check(config, shape, count)
    for tensor in range(shape.tensor + 1, count + 1):
        if count % tensor == 0:
            with pytest.raises(ConfigError, match="does not divide"):
                sharding.check(config, MeshShape(seq=count // tensor, tensor=tensor), count)


@pytest.mark.parametrize("vocab", [151_665, 151_643, 7])
def test_no_vocabulary_keeps_a_model_from_being_divided(vocab, tmp_path):
    config = dataclasses.replace(presets.config(tmp_path, "7b"), vocab_size=vocab)
    assert sharding.default_mesh(config, 4) == MeshShape(tensor=4)
    whole = memory.weights(config, MeshShape())
    assert memory.weights(config, MeshShape(tensor=4)) < 0.2502 * whole


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MeshShape(seq=2, tensor=4), "has 8 devices, there are 16: .* seq=4,tensor=4"),
        (MeshShape(tensor=16), "tensor=16 does not divide num_heads=28"),
        (MeshShape(tensor=2, data=8, seq=2), "seq=2,tensor=2,data=8 has 32 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_a_line(shape, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        sharding.check(presets.config(tmp_path, "7b"), shape, 16)
    assert "\n" not in str(error.value)


def test_a_mesh_reads_as_it_is_written():
    for shape in (MeshShape(), MeshShape(seq=4, tensor=2), MeshShape(data=3, seq=5)):
        assert sharding.parse(str(shape)) == shape
    assert sharding.parse("tensor=4, seq=2") == MeshShape(seq=2, tensor=4)


@pytest.mark.parametrize("text", ["", "seq", "seq=0", "seq=-1", "seq=2,seq=2", "rows=2", "seq=2,"])
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(ConfigError, match="mesh"):
        sharding.parse(text)


def test_a_mesh_axis_splits_an_array_once():
    assert Rules().spec(("embed", "mlp")) == jax.P(None, "tensor")
    assert Rules().spec(kv_cache.AXES) == jax.P(None, "tensor", "data", "seq", None)
    with pytest.raises(ValueError, match="one mesh axis on two dimensions"):
        Rules(embed="tensor").spec(("embed", "mlp"))


@pytest.mark.parametrize("name", list(CONFIGS)[::5])
def test_every_dimension_of_a_parameter_has_a_meaning_of_its_size(name):
    config = CONFIGS[name]
    sizes = {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.embed_dim,
        "mlp": config.mlp_dim,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }
    tree = params.abstract(config)
    axes = params.axes(config)
    checked = jax.tree.map(
        lambda leaf, axes: leaf.shape == tuple(sizes[axis] for axis in axes), tree, axes
    )
    assert all(jax.tree.leaves(checked))


TINY = Tiny(heads=8, kv_heads=4, hidden=32, mlp=48, vocab=40)
MESHES = [(1, 8, 1), (1, 2, 4), (2, 2, 2), (1, 5, 1)]


@pytest.mark.parametrize("vocab", [40, 5])
def test_weights_load_straight_to_their_shards(vocab, tmp_path):
    dataclasses.replace(TINY, vocab=vocab).write(tmp_path / "hf")
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    run(load_on_meshes, tmp_path / "hf", tmp_path / "ours")


def load_on_meshes(*directories):
    jax.config.update("jax_num_cpu_devices", 8)
    for directory in directories:
        config = model_config(directory)
        expected = jax.tree.map(np.asarray, weights.load(directory))
        for data, seq, tensor in MESHES:
            shape = MeshShape(data=data, seq=seq, tensor=tensor)
            mesh = sharding.make_mesh(jax.devices()[: shape.size], **dataclasses.asdict(shape))
            tree = weights.load(directory, shardings=params.shardings(config, mesh))
            found = jax.tree.map(np.asarray, tree)
            padding = -config.vocab_size % tensor
            for rows in found["embed"]["embedding"], found["head"]["kernel"].T:
                assert len(rows) == config.vocab_size + padding
                assert not rows[config.vocab_size :].any()
            found["embed"]["embedding"] = found["embed"]["embedding"][: config.vocab_size]
            found["head"]["kernel"] = found["head"]["kernel"][:, : config.vocab_size]
            jax.tree.map(np.testing.assert_array_equal, found, expected)
            held = dict.fromkeys(mesh.devices.flat, 0)
            for array in jax.tree.leaves(tree):
                for shard in array.addressable_shards:
                    held[shard.device] += math.prod(shard.data.shape)
            assert set(held.values()) == {memory.weights(config, shape)}
    with pytest.raises(ConfigError, match="has 4 devices, there are 8"):
        sharding.make_mesh(seq=4)
