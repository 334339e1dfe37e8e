"""The commands as a user meets them."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import typer
from support.checkpoints import Tiny
from support.children import run
from typer.testing import CliRunner

from convert.terminal import described
from qwen_jax.cli.convert import convert, export
from qwen_jax.cli.inspect import inspect, verify
from qwen_jax.storage.manifest import CheckpointError

APP = typer.Typer()
for verb in (convert, export, inspect, verify):
    APP.command()(verb)


def invoke(*arguments):
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


def refusal(*arguments) -> str:
    result = invoke(*arguments)
    assert isinstance(result.exception, CheckpointError), result.output
    return str(result.exception)


def test_convert_inspect_verify_and_export_walk_through(tmp_path):
    tiny = Tiny(layers=2, shards=2, dtype="bfloat16")
    tensors = tiny.write(tmp_path / "hf")
    ours = tmp_path / "some where" / "ours"
    planned = invoke("convert", tmp_path / "hf", ours, "--dry-run")
    assert "2 file(s), all intact" in planned.stdout
    assert os.listdir(tmp_path) == ["hf"]
    made = invoke("convert", tmp_path / "hf", ours)
    assert made.exit_code == 0
    assert made.stdout.splitlines()[-1].split()[0] == "next"
    numbers = sum(tensor.size for tensor in tensors.values())
    for directory, kind in ((tmp_path / "hf", "huggingface"), (ours, "converted")):
        found = json.loads(invoke("inspect", directory, "--json").stdout)
        assert found["kind"] == kind
        assert found["num_parameters"] == numbers
        assert found["bytes"] == {"bfloat16": 2 * numbers}
        assert {row["name"]: tuple(row["shape"]) for row in found["tensors"]} == tiny.shapes()
        listed = invoke("inspect", directory, "--grep", "layers.1.mlp").stdout
        assert listed.count("model.layers.") == 3
        for options in ([], ["--full"]):
            assert "is intact" in invoke("verify", directory, *options).stdout
    back = invoke("export", ours, tmp_path / "back")
    assert "every byte as in the source" in back.stdout
    again = invoke("convert", tmp_path / "hf", ours, "--resume")
    assert again.stdout == made.stdout


def test_what_is_in_the_way_is_said_with_the_way_out(tmp_path):
    Tiny(layers=1).write(tmp_path / "hf")
    Tiny(layers=1).write(tmp_path / "tuned", 1)
    assert "is not a directory" in refusal("convert", tmp_path / "none", tmp_path / "ours")
    assert "lie in one another" in refusal("convert", tmp_path / "hf", tmp_path / "hf" / "ours")
    assert "lie in one another" in refusal("convert", tmp_path / "hf", tmp_path, "--overwrite")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    for flags in ([], ["--resume"]):
        text = refusal("convert", tmp_path / "hf", tmp_path / "photos", *flags)
        assert "photos" in text
    text = refusal("convert", tmp_path / "hf", tmp_path / "photos", "--overwrite")
    assert "will not be replaced" in text
    assert os.listdir(tmp_path / "photos") == ["cat.jpg"]
    assert invoke("convert", tmp_path / "hf", tmp_path / "ours").exit_code == 0
    assert "--overwrite" in refusal("convert", tmp_path / "hf", tmp_path / "ours")
    assert "--overwrite" in refusal("convert", tmp_path / "tuned", tmp_path / "ours", "--resume")
    assert invoke("convert", tmp_path / "tuned", tmp_path / "ours", "--overwrite").exit_code == 0
    (tmp_path / "next.partial" / "checkpoint").mkdir(parents=True)
    work = {"source": "other", "dtype": "keep"}
    state = {"format": "qwen-jax staging 1", "work": work, "replace": False}
    (tmp_path / "next.partial" / "state.json").write_text(json.dumps(state))
    text = refusal("convert", tmp_path / "hf", tmp_path / "next")
    assert "--resume" in text
    assert "--overwrite" in text
    assert "another source" in refusal("convert", tmp_path / "hf", tmp_path / "next", "--resume")
    assert invoke("convert", tmp_path / "hf", tmp_path / "next", "--overwrite").exit_code == 0
    assert not (tmp_path / "next.partial").exists()
    assert "not a converted checkpoint" in refusal("export", tmp_path / "hf", tmp_path / "x")


def test_a_full_disk_is_one_line_and_the_run_can_be_resumed(tmp_path):
    Tiny(layers=1, vocab=4096).write(tmp_path / "hf")
    with pytest.raises(CheckpointError) as caught:
        run(convert_on_a_small_disk, tmp_path / "hf", tmp_path / "ours")
    assert str(caught.value).endswith(f"cannot be written: {os.strerror(errno.EFBIG)}")
    assert "\n" not in str(caught.value)
    assert invoke("convert", tmp_path / "hf", tmp_path / "ours", "--resume").exit_code == 0
    assert invoke("verify", tmp_path / "ours", "--full").exit_code == 0


def convert_on_a_small_disk(src, dst):
    """Files end at 100 kB, as they would where a disk is full."""
    from convert import weights

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    weights.convert(src, dst)


def test_a_disk_that_is_too_small_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    Tiny(layers=1).write(tmp_path / "hf")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    text = refusal("convert", tmp_path / "hf", tmp_path / "ours")
    assert "the disk has 0.0 GB free" in text


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    Tiny(layers=1).write(tmp_path / "hf")
    (tmp_path / "file").write_text("")
    text = refusal("convert", tmp_path / "hf", tmp_path / "file" / "ours")
    assert text.endswith("cannot be written: Not a directory")


def test_two_runs_do_not_write_one_output(tmp_path):
    Tiny(layers=1).write(tmp_path / "hf")
    from convert import publish

    with publish.Staging(tmp_path / "ours") as staging:
        staging.begin(
            {},
            overwrite=False,
            resume=False,
            same=lambda _: False,
            check_ours=print,
            writes=lambda _: True,
        )
        text = refusal("convert", tmp_path / "hf", tmp_path / "ours", "--resume")
        assert "another process is writing" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_how_to_go_on_and_does(number, tmp_path):
    Tiny(layers=16, shards=2).write(tmp_path / "hf")
    arguments = [str(tmp_path / "hf"), str(tmp_path / "ours")]
    process = subprocess.Popen(
        [sys.executable, "-m", "convert", *arguments], stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "ours.partial" / "parts" / "block_000.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, printed = process.communicate()
    assert process.returncode == 130
    assert printed.splitlines()[-1].startswith("stopped; continue with: qwen-jax convert ")
    assert not (tmp_path / "ours").exists()
    assert invoke("convert", *arguments, "--resume").exit_code == 0
    assert invoke("verify", tmp_path / "ours", "--full").exit_code == 0


def test_the_module_ends_with_one_line_and_status_2(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "convert", str(tmp_path / "none"), str(tmp_path / "ours")],
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: {tmp_path / 'none'} is not a directory\n"


def test_progress_is_told_in_words_where_there_is_no_terminal():
    line = described("convert", 3_000_000_000, 15_000_000_000, 10.0)
    assert line == "convert: 3.0 of 15.0 GB, 300 MB/s, 40 s left"
