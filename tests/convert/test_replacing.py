"""Only files that were written here are removed, in an output or beside it."""

import json
import os
from pathlib import Path

import pytest
from support.checkpoints import Tiny

from convert import pickled, publish, weights
from convert.export import RECORD, export
from qwen_jax.models import params
from qwen_jax.storage import atomic
from qwen_jax.storage.manifest import CheckpointError


@pytest.fixture
def there(tmp_path):
    """A source, a checkpoint of it and an export of that."""
    Tiny(layers=1).write(tmp_path / "hf")
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    return tmp_path


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory: the content of files, None for what is none."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def convert_again(there: Path, name: str = "ours") -> None:
    weights.convert(there / "hf", there / name, overwrite=True)


def export_again(there: Path, name: str = "back") -> None:
    export(there / "ours", there / name, overwrite=True)


AGAIN = {"ours": convert_again, "back": export_again}
USERS = {
    # what the user did in an output: how, and the file that is named
    "notes": (lambda out: (out / "notes.txt").write_text("mine"), "notes.txt"),
    "a folder": (lambda out: disk_file(out / "mine" / "deep" / "x"), "mine/deep/x"),
    "a hidden file": (lambda out: (out / ".env").write_text("mine"), ".env"),
    "a link": (lambda out: (out / "link").symlink_to(out.parent), "link"),
    "a pipe": (lambda out: os.mkfifo(out / "pipe"), "pipe"),
    "an edited file": (
        lambda out: (out / "generation_config.json").write_text("{}"),
        "generation_config.json",
    ),
    "a file in place of ours": (
        lambda out: ((out / "tokenizer.json").unlink(), os.mkfifo(out / "tokenizer.json")),
        "tokenizer.json",
    ),
}


def disk_file(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("mine")


@pytest.mark.parametrize("output", AGAIN)
def test_an_output_with_a_file_of_the_user_is_not_replaced_and_the_file_named(output, there):
    AGAIN[output](there)
    whole = tree(there)
    for what, (change, name) in USERS.items():
        change(there / output)
        before = tree(there)
        with pytest.raises(CheckpointError, match="will not be replaced") as caught:
            AGAIN[output](there)
        assert name in str(caught.value), what
        assert tree(there) == before
        restore(there, whole)
    AGAIN[output](there)
    left = set(tree(there)) ^ set(whole)
    assert not [name for name in left if not name.startswith("ours/params/")]


def restore(directory: Path, whole: dict[str, bytes | None]) -> None:
    """Makes a directory what it was."""
    for path in sorted(directory.rglob("*"), reverse=True):
        name = path.relative_to(directory).as_posix()
        if name not in whole:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        elif whole[name] is not None and (not path.is_file() or path.read_bytes() != whole[name]):
            path.unlink()
            path.write_bytes(whole[name])


FOREIGN = {
    "a web page's manifest": {"manifest.json": '{"name": "My page"}', "index.html": "x"},
    "a model from elsewhere": {"config.json": "{}", "model.safetensors": "weights"},
    "a damaged manifest of ours": {"manifest.json": '{"format": "qwen-jax checkpoint 1"'},
    "a record of an export with another file": {RECORD: "{}"},
    "files": {"cat.jpg": "meow"},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_directory_that_was_not_written_here_is_not_replaced(case, there):
    (there / "theirs").mkdir()
    for name, text in FOREIGN[case].items():
        (there / "theirs" / name).write_text(text)
    before = tree(there)
    for again in AGAIN.values():
        with pytest.raises(CheckpointError, match="theirs will not be replaced"):
            again(there, "theirs")
        assert tree(there) == before


def test_an_export_over_which_a_model_was_trained_is_not_replaced(there):
    path = there / "back" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed since"):
        export_again(there)
    assert path.read_bytes() == content


def test_checkpoints_and_exports_do_not_replace_each_other(there):
    for again, name in ((convert_again, "back"), (export_again, "other")):
        weights.convert(there / "hf", there / "other", overwrite=True)
        before = tree(there)
        with pytest.raises(CheckpointError, match="will not be replaced"):
            again(there, name)
        assert tree(there) == before


def test_what_comes_to_an_output_during_the_work_is_not_replaced(there):
    for replaced in (True, False):
        output = there / ("ours" if replaced else "new")
        with publish.Staging(output) as staging:
            staging.begin(
                {},
                overwrite=replaced,
                resume=False,
                same=lambda _: False,
                check_ours=weights.check_ours,
                writes=weights.writes,
            )
            (staging.directory / "file").write_text("new")
            disk_file(output / "mine" / "notes") if replaced else disk_file(output / "notes")
            with pytest.raises(CheckpointError, match=r"notes is not in|new exists"):
                staging.publish()
        assert (output / ("mine/notes" if replaced else "notes")).read_text() == "mine"


SIBLINGS = {
    "a user's folder": {"draft/notes": "mine"},
    "a file of the name of ours": {"checkpoint/notes": "mine"},
    "a state of another program": {"state.json": '{"work": {}, "replace": true}'},
    "a state that is no JSON": {"state.json": "{"},
    "a state with a field too many": {
        "state.json": '{"format": "qwen-jax staging 1", "work": {}, "replace": true, "x": 1}'
    },
    "ours with notes": {
        "state.json": '{"format": "qwen-jax staging 1", "work": {}, "replace": true}',
        "notes": "mine",
    },
    "ours with notes in what it prepares": {
        "state.json": '{"format": "qwen-jax staging 1", "work": {}, "replace": true}',
        "checkpoint/notes": "mine",
    },
    "ours with notes among the arrays": {
        "state.json": '{"format": "qwen-jax staging 1", "work": {}, "replace": true}',
        "checkpoint/params/final/state/notes": "mine",
    },
    "ours with notes among its records": {
        "state.json": '{"format": "qwen-jax staging 1", "work": {}, "replace": true}',
        "parts/notes": "mine",
    },
    "ours with notes in what it replaced": {
        "state.json": '{"format": "qwen-jax staging 1", "work": {}, "replace": true}',
        "old/notes": "mine",
    },
    "a lock that holds something": {"lock": "mine"},
}


def test_what_other_work_has_left_is_replaced_by_an_export_that_may(there):
    with publish.Staging(there / "new") as staging:
        staging.begin(
            {"export": "0" * 64},
            overwrite=False,
            resume=False,
            same=lambda _: False,
            check_ours=lambda _: None,
            writes=lambda _: True,
        )
    with pytest.raises(CheckpointError, match="start again with --overwrite"):
        export(there / "ours", there / "new")
    export(there / "ours", there / "new", overwrite=True)
    assert tree(there / "new") == tree(there / "back")
    assert not (there / "new.partial").exists()


@pytest.mark.parametrize("case", SIBLINGS)
def test_a_sibling_that_was_not_written_here_is_left_alone(case, there):
    for name, text in SIBLINGS[case].items():
        path = there / "new.partial" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = tree(there)
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(CheckpointError, match=r"new\.partial.*move it away|away"):
            weights.convert(there / "hf", there / "new", **options)
        assert tree(there) == before
    (there / "file.partial").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file\.partial is in the way"):
        export(there / "ours", there / "file")
    assert (there / "file.partial").read_text() == "mine"


def test_a_directory_of_the_name_for_unpickled_weights_is_left_alone(tmp_path):
    (tmp_path / "hf").mkdir()
    disk_file(tmp_path / "ours.unpickled" / "notes")
    with (
        pytest.raises(CheckpointError, match=r"ours\.unpickled is in the way"),
        pickled.as_safetensors(tmp_path / "hf", tmp_path / "ours"),
    ):
        pass
    assert tree(tmp_path / "ours.unpickled") == {"notes": b"mine"}


def test_no_output_is_made_at_the_root_or_around_the_source(tmp_path):
    Tiny(layers=1).write(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    for output in (Path("/"), tmp_path, tmp_path / "hf", tmp_path / "hf" / "ours"):
        with pytest.raises(CheckpointError, match="lie in one another"):
            weights.convert(tmp_path / "hf", output, overwrite=True, allow_pickle=True)
    assert tree(tmp_path).keys() == {
        "hf",
        *(f"hf/{name}" for name in ("config.json", "generation_config.json", "tokenizer.json")),
        "hf/pytorch_model.bin",
    }


def test_a_file_of_the_name_for_writing_is_left_alone(tmp_path):
    (tmp_path / "file.partial").write_text("mine")
    atomic.write(tmp_path / "file", "ours")
    assert tree(tmp_path) == {"file.partial": b"mine", "file": b"ours"}


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "generation_config.json",
        "sparse_attention_config.json",
        "tokenizer_config.json",
        "params/embed/x",
    ],
)
def test_a_file_that_would_be_read_and_is_not_in_the_manifest_is_found(name, tmp_path):
    Tiny(layers=1).write(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    (tmp_path / "ours" / "README.md").write_text("read by nobody")
    params.verify(tmp_path / "ours", full=True)
    for make in (Path.touch, os.mkfifo, lambda path: path.symlink_to("/nowhere")):
        make(tmp_path / "ours" / name)
        for check in (params.verify, weights.load):
            with pytest.raises(CheckpointError, match=f"{name} is not in the manifest: remove it"):
                check(tmp_path / "ours")
        (tmp_path / "ours" / name).unlink()


def test_a_record_of_an_export_lists_its_files(there):
    record = json.loads((there / "back" / RECORD).read_text())
    assert record["files"].keys() == set(os.listdir(there / "back")) - {RECORD}
