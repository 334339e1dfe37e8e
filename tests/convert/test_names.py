import json

import numpy as np
import pytest
from support.checkpoints import Tiny

from convert import names, source
from qwen_jax.models import params
from qwen_jax.models.configs import model_config

# Sizes from the model cards of Qwen2.5-Instruct-1M.
LARGE = {
    "7B": (Tiny(layers=28, hidden=3584, heads=28, kv_heads=4, mlp=18944, vocab=152064), 339),
    "14B": (Tiny(layers=48, hidden=5120, heads=40, kv_heads=8, mlp=13824, vocab=152064), 579),
}
PARAMETERS = {"7B": 7_615_616_512, "14B": 14_770_033_664}


def config_of(tiny, directory):
    (directory / "config.json").write_text(json.dumps(tiny.config()))
    return model_config(directory)


@pytest.mark.parametrize("size", LARGE)
def test_the_large_models_map_tensor_by_tensor(size, tmp_path):
    tiny, number = LARGE[size]
    config = config_of(tiny, tmp_path)
    table = names.table(config)
    assert {name: entry.source_shape for name, entry in table.items()} == tiny.shapes()
    assert len(table) == number
    tree = params.abstract(config)
    assert params.count(tree) == PARAMETERS[size]
    ours = {(entry.part, entry.path): entry.shape for entry in table.values()}
    assert len(ours) == number
    for part, subtree in params.parts(tree).items():
        for path, shape in leaves(subtree):
            assert ours.pop((part, path)) == shape
    assert not ours


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value.shape


@pytest.mark.torch
@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_of_transformers(tied, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiny = Tiny(layers=3, tied=tied, heads=8, kv_heads=2, hidden=32)
    config = config_of(tiny, tmp_path)
    raw = {key: value for key, value in tiny.config().items() if key != "torch_dtype"}
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**raw))
    theirs = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert {name: e.source_shape for name, e in names.table(config).items()} == theirs


@pytest.mark.parametrize("tiny", [Tiny(), Tiny(heads=4, kv_heads=1, hidden=32, tied=True)])
def test_any_piece_of_an_array_comes_from_the_rows_and_columns_that_hold_it(tiny, tmp_path):
    tensors = tiny.write(tmp_path / "hf")
    checked = source.check(tmp_path / "hf")
    rng = np.random.default_rng(0)
    for name, entry in checked.table.items():
        whole = entry.to_ours(tensors[name])
        for _ in range(20):
            ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in entry.shape]
            index = tuple(slice(int(start), int(stop)) for start, stop in ends)
            read = []

            def counted(cut, name=name, read=read):
                read.append(checked.read_piece(name, cut))
                return read[-1]

            piece = entry.piece(index, counted)
            assert piece.tobytes() == whole[index].tobytes(), (name, index)
            # Heads are cut one from another, and nothing within them.
            heads = entry.shape[-1] if len(entry.shape) > len(entry.source_shape) else 1
            assert sum(each.size for each in read) <= piece.size * heads
