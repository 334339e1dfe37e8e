import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints import Tiny, assert_trees_equal, expected_tree, write_shards
from support.children import run

from convert import source, weights
from convert.export import RECORD, export
from qwen_jax.models import params
from qwen_jax.models.configs import model_config
from qwen_jax.storage.manifest import CheckpointError

CASES = {
    "untied, one file": Tiny(),
    "tied, one file": Tiny(tied=True, dtype="bfloat16"),
    "untied, three files": Tiny(shards=3, dtype="bfloat16", layers=3),
    "tied, five files": Tiny(tied=True, shards=5, heads=8, kv_heads=1),
    "no grouping, one layer": Tiny(kv_heads=4, hidden=32, dtype="bfloat16", layers=1),
}


def contents(directory) -> dict[str, bytes]:
    """The files but the record of an export, which must have the sums of all others."""
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    if RECORD in found:
        record = json.loads(found.pop(RECORD))["files"]
        assert record == {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in found.items()
        }
    return found


@pytest.mark.parametrize("case", CASES)
def test_conversion_keeps_every_bit_there_and_back(case, tmp_path):
    tiny = CASES[case]
    expected = expected_tree(tiny, tiny.write(tmp_path / "hf"))
    reports = []
    weights.convert(tmp_path / "hf", tmp_path / "ours", progress=lambda *at: reports.append(at))
    abstract = params.abstract(model_config(tmp_path / "hf"), tiny.dtype)
    for directory in (tmp_path / "hf", tmp_path / "ours"):
        tree = weights.load(directory)
        assert_trees_equal(tree, expected)
        assert jax.tree.structure(tree) == jax.tree.structure(abstract)
    manifest = params.verify(tmp_path / "ours", full=True)
    assert manifest.num_parameters == sum(x.size for x in jax.tree.leaves(expected))
    total = sum(x.nbytes for x in jax.tree.leaves(expected))
    assert reports[-1] == (total, total)
    assert reports == sorted(reports)
    assert export(tmp_path / "ours", tmp_path / "back") == ()
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
    assert sorted(os.listdir(tmp_path)) == ["back", "hf", "ours"]


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_loads_as_its_tensors_and_comes_back(tied, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiny = Tiny(tied=tied, layers=3)
    raw = {key: value for key, value in tiny.config().items() if key != "torch_dtype"}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**raw))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf", max_shard_size="6KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    bits = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16), torch.float32: (torch.int32, "f4")}
    tensors = {}
    for name, value in model.state_dict().items():
        integers, same = bits[value.dtype]
        tensors[name] = value.view(integers).numpy().view(same)
    assert_trees_equal(weights.load(tmp_path / "hf"), expected_tree(tiny, tensors))
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    assert_trees_equal(weights.load(tmp_path / "ours"), expected_tree(tiny, tensors))
    assert export(tmp_path / "ours", tmp_path / "back") == ()
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def test_dtype_is_converted_by_rounding_to_nearest_wherever_it_is_asked_for(tmp_path):
    tiny = Tiny(shards=2)
    tensors = tiny.write(tmp_path / "hf")
    low = Tiny(shards=2, dtype="bfloat16")
    rounded = {name: round_to_bfloat16(tensor) for name, tensor in tensors.items()}
    expected = expected_tree(low, rounded)
    weights.convert(tmp_path / "hf", tmp_path / "low", dtype="bfloat16")
    assert_trees_equal(weights.load(tmp_path / "low"), expected)
    assert_trees_equal(weights.load(tmp_path / "hf", dtype=jnp.bfloat16), expected)
    params.verify(tmp_path / "low", full=True)
    assert export(tmp_path / "low", tmp_path / "back") == (
        "weights are bfloat16, to which they were converted",
    )
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in rounded.values())
    for path in (tmp_path / "back").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.tobytes() == rounded.pop(name).tobytes()
    assert not rounded
    wide = jax.tree.map(lambda x: x.astype(np.float32), expected)
    assert_trees_equal(weights.load(tmp_path / "low", dtype=jnp.float32), wide)
    assert_trees_equal(weights.load(tmp_path / "back", dtype=jnp.float32), wide)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even by integer arithmetic on the bits."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return bits.astype(np.uint16).view(ml_dtypes.bfloat16)


def test_tensors_of_mixed_dtypes_are_kept_and_load_as_the_wider(tmp_path):
    tiny = Tiny()
    tensors = tiny.write(tmp_path / "hf")
    for name in tensors:
        if "norm" not in name:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    write_shards(tmp_path / "hf", tensors, 1)
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    wide = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    for directory in (tmp_path / "hf", tmp_path / "ours"):
        assert_trees_equal(weights.load(directory), expected_tree(tiny, wide))
    export(tmp_path / "ours", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


@pytest.mark.parametrize(("tied", "shards"), [(False, 1), (True, 2)])
def test_half_precision_is_kept_as_it_is_and_computed_in_wider_or_rounded_numbers(
    tied, shards, tmp_path
):
    tiny = Tiny(dtype="float16", tied=tied, shards=shards)
    tensors = tiny.write(tmp_path / "hf")
    wide = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    rounded = {name: round_to_bfloat16(tensor) for name, tensor in wide.items()}
    manifest = weights.convert(tmp_path / "hf", tmp_path / "ours")
    assert {tensor.dtype for tensor in manifest.tensors} == {"float16"}
    params.verify(tmp_path / "ours", full=True)
    for directory in (tmp_path / "hf", tmp_path / "ours"):
        assert_trees_equal(weights.load(directory), expected_tree(tiny, wide))
        low = weights.load(directory, dtype=jnp.bfloat16)
        assert_trees_equal(low, expected_tree(tiny, rounded))
    assert export(tmp_path / "ours", tmp_path / "back") == ()
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
    for dtype, expected in (("float32", wide), ("bfloat16", rounded)):
        weights.convert(tmp_path / "hf", tmp_path / dtype, dtype=dtype)
        assert_trees_equal(weights.load(tmp_path / dtype), expected_tree(tiny, expected))
    with pytest.raises(ValueError, match="must be 'keep', 'bfloat16' or 'float32'"):
        weights.convert(tmp_path / "hf", tmp_path / "half", dtype="float16")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_tied_model_may_keep_its_embedding_as_the_head_alone(shards, tmp_path):
    tiny = Tiny(tied=True, dtype="bfloat16")
    tensors = tiny.write(tmp_path / "hf")
    expected = expected_tree(tiny, tensors)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    (tmp_path / "hf" / "model.safetensors").unlink()
    write_shards(tmp_path / "hf", tensors, shards)
    assert_trees_equal(weights.load(tmp_path / "hf"), expected)
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    assert_trees_equal(weights.load(tmp_path / "ours"), expected)
    params.verify(tmp_path / "ours", full=True)
    assert export(tmp_path / "ours", tmp_path / "back") == ()
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
    weights.convert(tmp_path / "hf", tmp_path / "wide", dtype="float32")
    export(tmp_path / "wide", tmp_path / "again")
    assert source.check(tmp_path / "again").tensors.keys() == tensors.keys()
    raw = {**tiny.config(), "tie_word_embeddings": False}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is missing"):
        weights.load(tmp_path / "hf")


def test_a_tied_head_that_repeats_the_embedding_is_accepted_and_any_other_refused(tmp_path):
    tiny = Tiny(tied=True, shards=2)
    tensors = tiny.write(tmp_path / "hf")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_shards(tmp_path / "hf", tensors, 2)
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    assert "head" not in weights.load(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
    tensors["lm_head.weight"][-1, -1] += 1
    write_shards(tmp_path / "hf", tensors, 2)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        weights.convert(tmp_path / "hf", tmp_path / "other")


def test_rotary_buffers_of_old_files_are_left_out_and_named(tmp_path):
    tiny = Tiny()
    tensors = tiny.write(tmp_path / "hf")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.ones(2, np.float32)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    assert export(tmp_path / "ours", tmp_path / "back") == ("2 rotary buffers are left out",)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tiny.shapes().keys()
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in back)


def test_every_flipped_bit_is_found_by_full_verification(tmp_path):
    Tiny(layers=1).write(tmp_path / "hf")
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    files = sorted(path for path in (tmp_path / "ours").rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    rng = np.random.default_rng(0)
    for number in range(200):
        # Every file in turn, then as often as it is long.
        file = number if number < len(files) else rng.choice(len(files), p=sizes / sizes.sum())
        if not sizes[file]:
            continue
        whole = files[file].read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        files[file].write_bytes(damaged)
        with pytest.raises(CheckpointError, match=files[file].name):
            params.verify(tmp_path / "ours", full=True)
        files[file].write_bytes(whole)
    params.verify(tmp_path / "ours", full=True)


def test_missing_and_added_and_shortened_files_are_found_by_the_fast_check(tmp_path):
    Tiny(layers=1).write(tmp_path / "hf")
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    for path in sorted(path for path in (tmp_path / "ours").rglob("*") if path.is_file()):
        path.rename(tmp_path / "aside")
        with pytest.raises(CheckpointError, match=path.name):
            params.verify(tmp_path / "ours")
        (tmp_path / "aside").rename(path)
    extra = tmp_path / "ours" / "params" / "embed" / "state" / "d" / "extra"
    extra.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"extra is not in the manifest"):
        weights.load(tmp_path / "ours")


def test_a_manifest_of_another_model_is_refused(tmp_path):
    Tiny(layers=2).write(tmp_path / "hf")
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    Tiny(layers=3).write(tmp_path / "larger")
    shutil.copy(tmp_path / "larger" / "config.json", tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        weights.load(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"block_002 has shape None, config\.json asks for"):
        params.read_manifest(tmp_path / "ours")


def test_arrays_land_where_shardings_say(tmp_path):
    tiny = Tiny(kv_heads=4)
    expected = expected_tree(tiny, tiny.write(tmp_path / "hf"))
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    for directory in (tmp_path / "hf", tmp_path / "ours"):
        assert_trees_equal(run(load_on_two_devices, directory), expected)


def load_on_two_devices(directory):
    """The parameters as loaded onto a mesh, checked to be split where it says."""
    jax.config.update("jax_num_cpu_devices", 2)
    mesh = jax.make_mesh((2,), ("tensor",))
    axes = {"q": 2, "k": 2, "v": 2, "gate": 2, "up": 2, "down": 1}

    def place(path, leaf):
        keys = [key.key for key in path]
        axis = next((axes[key] for key in keys if key in axes and keys[-1] == "kernel"), None)
        spec = ["tensor" if number == axis else None for number in range(len(leaf.shape))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    shardings = jax.tree_util.tree_map_with_path(place, params.abstract(model_config(directory)))
    tree = weights.load(directory, shardings=shardings)
    for array, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    return jax.tree.map(np.asarray, tree)
