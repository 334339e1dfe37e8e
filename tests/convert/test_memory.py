"""Peak memory of conversion depends on a layer, not on the model."""

import pytest
from support.checkpoints import Tiny, write_large
from support.children import peak_memory, run

from convert import export, weights
from qwen_jax.models import params

MODEL = Tiny(
    layers=12, hidden=1024, heads=8, kv_heads=2, mlp=4096, vocab=32000, tied=True, dtype="bfloat16"
)
SHARDS = 5


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of some 430 MB in five files, and the bytes of the largest."""
    directory = tmp_path_factory.mktemp("large") / "hf"
    write_large(directory, MODEL, SHARDS)
    return directory


def test_memory_depends_on_shards_and_layers_not_on_the_model(large, tmp_path):
    """Bounds that the whole model would break: it is five times the slack."""
    sizes = [path.stat().st_size for path in large.glob("*.safetensors")]
    slack = 96 << 20
    bound = 2 * max(sizes) + slack
    assert sum(sizes) > bound
    for work in (
        (weights.convert, large, tmp_path / "ours"),
        (params.verify, tmp_path / "ours", ("full", True)),
        (export.export, tmp_path / "ours", tmp_path / "back"),
    ):
        arguments = [argument for argument in work if not isinstance(argument, tuple)]
        options = dict(argument for argument in work if isinstance(argument, tuple))
        before, peak = run(peak_memory, *arguments, **options)
        assert peak - before < bound, work
    before, peak = run(peak_memory, weights.load, large)
    assert peak - before < sum(sizes) + bound
