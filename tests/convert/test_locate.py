"""Paths that mean a checkpoint, and those that look like one."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.checkpoints import Tiny

from convert import source, weights
from qwen_jax.config import ConfigError
from qwen_jax.storage import hub as locate
from qwen_jax.storage.manifest import CheckpointError

REVISIONS = ("0" * 40, "1" * 40)


@pytest.fixture
def cache(tmp_path):
    """The cache directory of a repository, with two snapshots that link to blobs."""
    repository = tmp_path / "hub" / "models--Qwen--tiny"
    (repository / "blobs").mkdir(parents=True)
    for number, revision in enumerate(REVISIONS):
        snapshot = repository / "snapshots" / revision
        Tiny(layers=number + 1).write(snapshot, number)
        for path in sorted(snapshot.iterdir()):
            blob = f"{number}-{path.name}"
            shutil.move(path, repository / "blobs" / blob)
            path.symlink_to(f"../../blobs/{blob}")
    return repository


def test_the_cache_of_a_repository_stands_for_the_snapshot_of_its_main_branch(cache):
    (cache / "refs").mkdir()
    for number, revision in enumerate(REVISIONS):
        (cache / "refs" / "main").write_text(revision)
        for path in (cache, cache / "snapshots", cache / "snapshots" / revision):
            assert locate.checkpoint(path) == cache / "snapshots" / revision
            assert source.check(path).config.num_layers == number + 1
    assert weights.load(cache)["blocks"]["mlp_norm"]["scale"].shape[0] == 2
    weights.convert(cache, cache.parent / "ours")
    assert weights.load(cache.parent / "ours")["blocks"]["mlp_norm"]["scale"].shape[0] == 2


def test_a_cache_that_does_not_say_which_snapshot_is_refused_with_their_names(cache):
    with pytest.raises(ConfigError, match=f"no refs/main .*{REVISIONS[0]}, .*{REVISIONS[1]}"):
        source.check(cache)
    (cache / "refs").mkdir()
    for named in ("2" * 40, "", "../../../etc", "x" * 300):
        (cache / "refs" / "main").write_text(named)
        with pytest.raises(ConfigError, match="no refs/main that names one of its snapshots"):
            source.check(cache)
    (cache / "refs" / "main").unlink()
    shutil.rmtree(cache / "snapshots" / REVISIONS[0])
    assert locate.checkpoint(cache) == cache / "snapshots" / REVISIONS[1]
    shutil.rmtree(cache / "snapshots" / REVISIONS[1])
    with pytest.raises(ConfigError, match=r"snapshots is empty: download the model again"):
        source.check(cache)
    with pytest.raises(ConfigError, match=r"cache of several models: .*models--Qwen--tiny$"):
        source.check(cache.parent)


def test_an_adapter_is_refused_with_the_way_to_merge_it(tmp_path):
    raw = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "adapter_model.safetensors")
    said = r"adapter \(LoRA\) of the model Qwen/Qwen2\.5-7B-Instruct, not a model: merge both"
    with pytest.raises(ConfigError, match=said):
        source.check(tmp_path)
    # Beside a whole model too: transformers would add the adapter to it.
    Tiny().write(tmp_path)
    with pytest.raises(ConfigError, match=said):
        source.check(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "\\u001b[2J"}')
    with pytest.raises(ConfigError, match=r"of the model \\x1b\[2J, not"):
        source.check(tmp_path)


def test_a_model_for_llama_cpp_is_named(tmp_path):
    (tmp_path / "model-q4_k_m.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model-q4_k_m.gguf"):
        with pytest.raises(ConfigError, match=r"a model for llama\.cpp \(GGUF\)"):
            source.check(path)


@pytest.mark.parametrize("name", ["none", "n" * 300, "zero\0byte"])
def test_a_path_that_is_no_directory_is_said(tmp_path, name):
    with pytest.raises(CheckpointError, match="is not a directory"):
        source.check(tmp_path / name)
