import os

import jax
import pytest
from checkpoints import Tiny, assert_trees_equal, expected_tree

from convert import weights
from qwen_jax import params
from qwen_jax.config import model_config

CASES = {
    "untied, one file": Tiny(),
    "tied, one file": Tiny(tied=True, dtype="bfloat16"),
    "untied, three files": Tiny(shards=3, dtype="bfloat16", layers=3),
    "tied, five files": Tiny(tied=True, shards=5, heads=8, kv_heads=1),
    "no grouping": Tiny(kv_heads=4, hidden=32, dtype="bfloat16"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_loading_gives_the_tensors_that_were_written(case, tmp_path):
    tiny = CASES[case]
    expected = expected_tree(tiny, tiny.write(tmp_path / "hf"))
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    abstract = params.abstract(model_config(tmp_path / "hf"), tiny.dtype)
    for directory in (tmp_path / "hf", tmp_path / "ours"):
        tree = weights.load(directory)
        assert_trees_equal(tree, expected)
        assert jax.tree.structure(tree) == jax.tree.structure(abstract)
    assert sorted(os.listdir(tmp_path)) == ["hf", "ours"]
    manifest = params.verify(tmp_path / "ours", full=True)
    assert manifest.num_parameters == sum(x.size for x in jax.tree.leaves(expected))
