"""Weights in .bin files: refused, or read without running what they carry."""

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import typer
from support.checkpoints import Tiny, assert_trees_equal, expected_tree
from typer.testing import CliRunner

from convert import weights
from qwen_jax.cli.convert import convert
from qwen_jax.storage.manifest import CheckpointError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

BIN = "pytorch_model.bin"


class Gadget:
    """An object whose unpickling calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(sentinel: Path) -> dict[str, bytes]:
    """Files that would make `sentinel` if anything in them were run."""
    import builtins
    import subprocess

    touch = f"open({str(sentinel)!r}, 'w').close()"
    gadgets = {
        "system": Gadget(os.system, f"touch {sentinel}"),
        "eval": Gadget(builtins.eval, touch.replace("open", "__import__('io').open")),
        "exec": Gadget(builtins.exec, touch),
        "mkdir": Gadget(os.mkdir, str(sentinel)),
        "popen": Gadget(subprocess.Popen, ["touch", str(sentinel)]),
        "open": Gadget(io.open, str(sentinel), "w"),
        "getattr": Gadget(builtins.getattr, Gadget(builtins.__import__, "os"), "abort"),
        "torch load": Gadget(torch.load, str(sentinel), None, None, False),
    }
    files = {}
    for name, gadget in gadgets.items():
        files[f"{name}, zip"] = as_zip(gadget)
        buffer = io.BytesIO()
        pickle.dump({"model.norm.weight": gadget}, buffer)
        files[f"{name}, bare pickle"] = buffer.getvalue()
    files["inside a tensor dict"] = as_zip(
        {"model.norm.weight": torch.zeros(4), "extra": gadgets["mkdir"]}
    )
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        content = pickle.dumps(gadgets["mkdir"])
        entry = tarfile.TarInfo("pickle")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    files["old tar"] = inner.getvalue()
    return files


def as_zip(value) -> bytes:
    """The zip that torch.save writes, with its pickle replaced."""
    buffer = io.BytesIO()
    torch.save({"model.norm.weight": torch.zeros(4)}, buffer)
    out = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = pickle.dumps(
                    value if isinstance(value, Gadget) else {"x": value["extra"]}, protocol=2
                )
            new.writestr(entry.filename, content)
    return out.getvalue()


@pytest.fixture
def directory(tmp_path):
    Tiny(layers=1).write(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    return tmp_path / "hf"


def test_gadgets_do_run_where_pickle_is_trusted(tmp_path):
    pickle.loads(pickle.dumps(Gadget(os.mkdir, str(tmp_path / "ran"))))
    assert (tmp_path / "ran").exists()


def test_bin_files_are_refused_with_a_pointer_to_safetensors(directory, tmp_path):
    for name, content in hostile(tmp_path / "ran").items():
        (directory / BIN).write_bytes(content)
        with pytest.raises(CheckpointError, match="safetensors, or convert with --allow-pickle"):
            weights.convert(directory, tmp_path / "ours")
        assert sorted(os.listdir(tmp_path)) == ["hf"], name


@pytest.mark.parametrize("case", ["system, zip", "exec, bare pickle", "inside a tensor dict"])
def test_a_gadget_is_not_run_even_when_pickles_are_allowed(case, directory, tmp_path):
    (directory / BIN).write_bytes(hostile(tmp_path / "ran")[case])
    with pytest.raises(CheckpointError, match=r"hf: \w+Error: "):
        weights.convert(directory, tmp_path / "ours", allow_pickle=True)
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_no_gadget_is_run_by_what_the_child_process_does(directory, tmp_path):
    from convert import pickled

    for name, content in hostile(tmp_path / "ran").items():
        (directory / BIN).write_bytes(content)
        with pytest.raises(Exception, match=r"."):
            pickled.main(directory, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["hf"], name


@pytest.mark.parametrize("shards", [1, 2])
def test_honest_bin_files_convert_like_safetensors(shards, directory, tmp_path):
    import json

    tiny = Tiny(layers=1, tied=True)
    tensors = tiny.write(tmp_path / "same")
    shutil.copy(tmp_path / "same" / "config.json", directory)
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if shards == 1:
        torch.save(state, directory / BIN)
    else:
        names = list(state)
        files = {"pytorch_model-00001-of-00002.bin": names[:4]}
        files["pytorch_model-00002-of-00002.bin"] = names[4:]
        for file, run in files.items():
            torch.save({name: state[name] for name in run}, directory / file)
        index = {"weight_map": {name: file for file, run in files.items() for name in run}}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    weights.convert(directory, tmp_path / "ours", allow_pickle=True)
    assert_trees_equal(weights.load(tmp_path / "ours"), expected_tree(tiny, tensors))
    assert sorted(os.listdir(tmp_path)) == ["hf", "ours", "same"]


@pytest.fixture
def honest(directory, tmp_path):
    """A directory of one honest .bin file; returns what is in it."""
    tiny = Tiny(layers=1, tied=True, dtype="bfloat16")
    tensors = tiny.write(tmp_path / "same")
    shutil.copy(tmp_path / "same" / "config.json", directory)
    state = {name: torch.from_numpy(each.astype("f4")).bfloat16() for name, each in tensors.items()}
    torch.save(state, directory / BIN)
    return state


def planned(directory, tmp_path, *flags):
    app = typer.Typer()
    app.command()(convert)
    arguments = [str(directory), str(tmp_path / "ours"), "--dry-run", *flags]
    return CliRunner().invoke(app, arguments)


def test_a_dry_run_says_what_bin_files_would_become_and_writes_nothing(
    honest, directory, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    refused = planned(directory, tmp_path)
    assert isinstance(refused.exception, CheckpointError)
    assert "convert with --allow-pickle-weights" in str(refused.exception)
    done = planned(directory, tmp_path, "--allow-pickle-weights")
    assert done.exit_code == 0
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    size = sum(2 * tensor.numel() for tensor in honest.values())
    assert (
        rows["source"].strip() == f"{directory}, 1 file(s), whose tensors are those of config.json"
    )
    assert rows["tensors"].strip() == str(len(honest))
    assert f"{size / 1e9:.2f} GB, dtype keep" in rows["would write"]
    assert sorted(os.listdir(tmp_path)) == ["hf", "same", "scratch"]
    assert os.listdir(tmp_path / "scratch") == []


def test_a_dry_run_finds_what_is_wrong_with_bin_files(honest, directory, tmp_path):
    faults = {
        "model.norm.weight is missing": {
            name: each for name, each in honest.items() if name != "model.norm.weight"
        },
        "model.norm.weight has shape [3]": honest | {"model.norm.weight": torch.zeros(3)},
        "is of complex64": honest | {"model.norm.weight": torch.zeros(4, dtype=torch.complex64)},
    }
    for said, state in faults.items():
        torch.save(state, directory / BIN)
        error = planned(directory, tmp_path, "--allow-pickle-weights").exception
        assert isinstance(error, CheckpointError)
        assert said in str(error)
    (directory / BIN).write_bytes(hostile(tmp_path / "ran")["exec, bare pickle"])
    error = planned(directory, tmp_path, "--allow-pickle-weights").exception
    assert isinstance(error, CheckpointError)
    assert sorted(os.listdir(tmp_path)) == ["hf", "same"]


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}])
def test_what_is_in_the_way_is_refused_before_bin_files_are_read(
    flags, honest, directory, tmp_path, monkeypatch
):
    from convert import pickled

    monkeypatch.setattr(pickled.subprocess, "run", None)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "cat.jpg").write_text("meow")
    with pytest.raises(CheckpointError, match=r"exists: replace it|will not be replaced"):
        weights.convert(directory, tmp_path / "ours", allow_pickle=True, **flags)
    assert os.listdir(tmp_path / "ours") == ["cat.jpg"]
