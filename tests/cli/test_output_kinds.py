"""Outputs that are no regular files: written through, or refused before any work."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.plot_files import write_report

from qwen_jax.storage import atomic

THROUGH = {
    "csv": "plot recall REPORT --csv PATH",
    "picture": "plot recall REPORT --out PATH",
}
REFUSED = {
    "budgets": "calibrate MODEL --data TEXT --lengths 16 --out PATH",
    "report": "calibrate MODEL --data TEXT --lengths 16 --out NEW --report PATH",
    "answers": "eval passkey MODEL --lengths 500 --out PATH",
    "batch": "batch MODEL LINES PATH",
    "logits": "score MODEL --tokens IDS --out PATH",
    "session": "prefill MODEL --tokens IDS --out PATH",
    "trace": "score MODEL --tokens IDS --out NEW --profile PATH",
    "checkpoint": "convert MODEL PATH",
    "export": "export OURS PATH",
    "job": "export-job slurm --topology h100:8 --partition p --time 60 --command true "
    "--compile-cache /c --out PATH",
}


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    from qwen_jax.cli import main

    folder = tmp_path_factory.mktemp("files")
    write_report(folder / "REPORT")
    (folder / "TEXT").write_text("a" * 100)
    (folder / "IDS").write_text("1 2 3")
    (folder / "LINES").write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "ab"}}\n'
    )
    noted = Path(shutil.copytree(tiny, folder / "NOTED"))
    config = json.loads((noted / "config.json").read_text())
    (noted / "config.json").write_text(json.dumps(config | {"unsloth_version": "2025.1"}))
    heads = {str(head): ["vertical_and_slash", 8, 8, 1.0] for head in range(4)}
    (folder / "BUDGETS").write_text(json.dumps([heads] * 2))
    assert main(["convert", str(tiny), str(folder / "OURS")]) == 0
    return folder


def words(line, files, tiny, tmp_path, path):
    named = {"MODEL": str(tiny), "NEW": str(tmp_path / "new"), "PATH": str(path)}
    there = set(os.listdir(files))
    return [str(files / word) if word in there else named.get(word, word) for word in line.split()]


def node(path):
    status = os.lstat(path)
    return stat.S_IFMT(status.st_mode), status.st_ino, status.st_rdev


@pytest.fixture(params=["pipe", "null", "full", "stdout"])
def path(request, tmp_path):
    """No regular file; unchanged afterwards, and nothing new beside it."""
    place = tmp_path / "there" / "x"
    place.parent.mkdir()
    if request.param == "pipe":
        os.mkfifo(place)
    elif request.param == "stdout":
        place.symlink_to("/proc/self/fd/1")
    elif os.getuid() == 0:
        os.mknod(place, stat.S_IFCHR | 0o666, os.stat(f"/dev/{request.param}").st_rdev)
    else:
        place = f"/dev/{request.param}"
    before = node(place)
    yield place
    assert node(place) == before
    assert os.listdir(tmp_path / "there") in ([], ["x"])


@pytest.mark.parametrize("verb", REFUSED)
def test_what_is_read_again_is_refused_before_the_work(
    verb, path, files, tiny, tmp_path, run, monkeypatch
):
    from qwen_jax.llm.model import Model

    monkeypatch.setattr(Model, "engine", None)  # no work is done
    code, _, err = run(*words(REFUSED[verb], files, tiny, tmp_path, path))
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert str(path) in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", THROUGH)
def test_what_is_written_once_goes_through_a_pipe(verb, files, tiny, tmp_path, run):
    pytest.importorskip("matplotlib")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    code, _, _ = run(*words(THROUGH[verb], files, tiny, tmp_path, pipe))
    reader.join()
    name = tmp_path / "x.png"
    assert run(*words(THROUGH[verb], files, tiny, tmp_path, name))[0] == code == 0
    assert found == [name.read_bytes()]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("verb", THROUGH)
def test_what_is_written_once_goes_to_devices(verb, files, tiny, tmp_path, run):
    pytest.importorskip("matplotlib")
    assert run(*words(THROUGH[verb], files, tiny, tmp_path, "/dev/null"))[0] == 0
    code, _, err = run(*words(THROUGH[verb], files, tiny, tmp_path, "/dev/full"))
    assert (code, err.splitlines()[-1]) == (2, "error: /dev/full: No space left on device")


@pytest.mark.parametrize("mode", ["wb", "ab", "pipe"])
def test_what_is_written_to_stdout_comes_after_what_was_printed(mode, files, tiny, tmp_path):
    """A stdout that is a file is neither replaced nor written from its beginning."""
    line = words(THROUGH["csv"], files, tiny, tmp_path, "/dev/stdout")
    command = [sys.executable, "-m", "qwen_jax", *line]
    kept = tmp_path / "kept"
    kept.write_text("before\n")
    if mode == "pipe":
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode()
    else:
        with kept.open(mode) as file:
            subprocess.run(command, check=True, stdout=file)
        text = kept.read_text()
    assert text.startswith("before\n") == (mode == "ab")
    drawn, _, csv = text.partition("map,layer,head,value\n")
    assert "attention recall" in drawn
    assert len(csv.splitlines()) == 2 * 3 * 2
    assert sorted(os.listdir(tmp_path)) == ["kept"]


def test_links_that_lead_nowhere_or_in_circles_are_no_streams(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("nowhere")
    (tmp_path / "file").write_text("")
    (tmp_path / "d").symlink_to("file")
    for name in ("a", "c", "d", "file", "none"):
        assert not atomic.is_stream(tmp_path / name)


EARLY = {
    "picture of another kind": ("--out x.jpg", "must end in .png"),
    "picture where nothing can be": ("--out IDS/x.png", "IDS: it is not a directory"),
    "picture over another file": ("--out mine.png", "exists and was not written by this command"),
    "layer": ("--layer 1 --out x.png", "--layer 1 must be from 0 to 0"),
    "negative layer": ("--layer -1 --out x.jpg", "--layer -1 must be at least 0"),
    "head": ("--head 4", "--head 4 must be from 0 to 3"),
}


@pytest.mark.parametrize("case", EARLY)
def test_what_a_plan_cannot_draw_is_refused_before_the_text_is_read(
    case, files, tiny, tmp_path, run, monkeypatch
):
    from qwen_jax.llm import documents
    from qwen_jax.llm.model import Model

    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.png").write_text("mine")
    monkeypatch.setattr(Model, "engine", None)
    monkeypatch.setattr(documents, "read", None)
    flags, said = EARLY[case]
    line = f"plot plan MODEL --file TEXT --sparse-config BUDGETS {flags}"
    line = line.replace("IDS/", f"{files}/IDS/")
    code, _, err = run(*words(line, files, tiny, tmp_path, None))
    assert code == 2
    assert said in err.splitlines()[-1]
    assert (tmp_path / "mine.png").read_text() == "mine"


def test_a_plan_without_matplotlib_is_refused_before_the_text_is_read(
    files, tiny, tmp_path, run, monkeypatch
):
    from qwen_jax.llm.model import Model

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(Model, "engine", None)
    line = "plot plan MODEL --file TEXT --sparse-config BUDGETS --out x.png"
    code, _, err = run(*words(line, files, tiny, tmp_path, None))
    assert code == 2
    assert err.splitlines()[-1].startswith("error: --out needs matplotlib")


def test_replicas_are_refused_before_a_prompt_is_read(files, tiny, tmp_path, run, monkeypatch):
    from qwen_jax.llm.model import Model

    monkeypatch.setattr(Model, "engine", None)
    line = "prefill MODEL --tokens IDS --out NEW --mesh data=2"
    code, _, err = run(*words(line, files, tiny, tmp_path, None))
    assert code == 2
    assert "one prompt has no replicas" in err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("other", ["link", "same"])
def test_a_picture_and_its_numbers_are_two_files(other, files, tiny, tmp_path, run):
    pytest.importorskip("matplotlib")
    path = tmp_path / "x.png"
    csv = path
    if other == "link":
        csv = tmp_path / "y.png"
        csv.symlink_to(path)
    code, _, err = run("plot", "recall", files / "REPORT", "--out", path, "--csv", csv)
    assert code == 2
    assert "error: " in err
    assert not path.exists()


QUIET = {
    "ask": "ask MODEL Why? --file TEXT --greedy --max-new-tokens 1",
    "generate": "generate MODEL --tokens IDS --greedy --max-new-tokens 1",
    "score": "score MODEL --tokens IDS --out NEW",
    "prefill": "prefill MODEL --file TEXT --out NEW",
    "batch": "batch MODEL LINES NEW --greedy --max-new-tokens 2",
    "eval": "eval passkey MODEL --lengths 500 --depths 0.5 --out NEW",
    "plot": "plot recall REPORT --csv NEW",
    "plan": "plan MODEL --topology v5e:1",
    "bench": "bench MODEL --lengths 16 --new-tokens 2 --repeats 1",
    "convert": "convert NOTED NEW",
    "export": "export OURS NEW",
    "job": "export-job slurm --topology h100:8 --partition p --time 60 --command true "
    "--compile-cache /c --out NEW",
}


@pytest.mark.parametrize("verb", QUIET)
def test_quiet_says_nothing_on_stderr(verb, files, tiny, tmp_path, run):
    line = words(QUIET[verb], files, tiny, tmp_path, None)
    assert run(*line, "-q")[::2] == (0, "")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_conversion_says_what_it_leaves_unread_unless_quiet(quiet, files, tmp_path, run):
    for more in ([], ["--dry-run"]):
        line = ["convert", files / "NOTED", tmp_path / "new", *more, *["-q"] * quiet]
        code, _, err = run(*line)
        assert code == 0
        assert ("unsloth_version" in err) != quiet
        if quiet:
            assert err == ""
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
