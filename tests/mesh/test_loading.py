"""Peak memory of loading onto a mesh: the placed arrays and little more than a part."""

import jax
import jax.numpy as jnp
import pytest
from support.checkpoints import Tiny, write_large
from support.children import peak, run

from convert import weights
from qwen_jax.distributed import sharding
from qwen_jax.models import params
from qwen_jax.models.configs import model_config

MODEL = Tiny(layers=16, hidden=2048, heads=16, kv_heads=4, mlp=8192, vocab=32000, dtype="bfloat16")
MESH = "seq=2,tensor=4"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Some 2 GB in six files, and the same converted."""
    directory = tmp_path_factory.mktemp("large") / "hf"
    write_large(directory, MODEL, 6)
    weights.convert(directory, directory.with_name("ours"))
    return directory, directory.with_name("ours")


@pytest.mark.long
def test_loading_onto_a_mesh_holds_the_shards_and_a_part(checkpoints):
    config = model_config(checkpoints[0])
    leaves = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
        for name, part in params.parts(params.abstract(config)).items()
    }
    largest, whole = max(leaves.values()), sum(leaves.values())
    slack = 768 << 20  # half of it is used; without returning what was freed, more than all
    assert whole >= 2 * 10**9 > largest + slack
    for directory in checkpoints:
        placed, added = run(load, directory)
        assert placed >= 2 * whole - (1 << 20)  # along `seq` everything is there twice
        assert added - placed <= largest + slack, directory


def load(directory):
    """Bytes that lie on devices, and those by which the peak of this process has grown."""
    shape = sharding.parse(MESH)
    jax.config.update("jax_num_cpu_devices", shape.size)
    jax.block_until_ready(jnp.zeros(1))
    mesh = sharding.make_mesh(seq=shape.seq, tensor=shape.tensor)
    before = peak()
    tree = weights.load(directory, shardings=params.shardings(model_config(directory), mesh))
    placed = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards
    )
    return placed, peak() - before
