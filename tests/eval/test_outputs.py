"""Files that `--out` names: one of the same command is replaced, any other is left alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.plot_files import record, write_log, write_report

from qwen_jax.cli import calibrate, main, score
from qwen_jax.eval import heatmap, plot, sources

USERS = {
    "text": b"mine",
    "nothing": b"",
    "archive": b"PK\x05\x06" + bytes(18),
    "png": b"\x89PNG\r\n",
}


def write_logits(path: Path) -> None:
    score.write_npz(path, iter([np.ones((2, 3), np.float32)]), (2, 3))


def write_csv(path: Path) -> None:
    log = write_log(path.parent / "log.jsonl", [record(1000, 0.5, True)])
    heatmap.write_csv(sources.scores([log]), path)


def write_picture(path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = write_log(path.parent / "log.jsonl", [record(1000, 0.5, True)])
    plot.save_heat_maps(sources.scores([log]), path)


@pytest.mark.parametrize(
    ("write", "name"), [(write_logits, "x.npz"), (write_csv, "x.csv"), (write_picture, "x.png")]
)
def test_a_file_that_was_not_written_here_is_not_replaced(write, name, tmp_path):
    path = tmp_path / name
    write(path)
    first = path.read_bytes()
    write(path)
    assert path.read_bytes()[:20] == first[:20]
    for content in USERS.values():
        path.write_bytes(content)
        with pytest.raises(FileExistsError, match="exists and was not written by this command"):
            write(path)
        assert path.read_bytes() == content
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        write(path)
    assert path.is_symlink()


def test_budgets_are_replaced_only_if_the_report_beside_them_knows_them(tmp_path):
    out, report = tmp_path / "budgets.json", tmp_path / "budgets.report.json"
    calibrate.check_ours(out, report)
    out.write_text("[]\n")
    sums = {
        "published": None,
        "changed": "0" * 64,
        "ours": "37517e5f3dc66819f61f5a7bb8ace1921282415f10551d2defa5c3eb0985b570",
    }
    for kind, sha256 in sums.items():
        if sha256 is not None:
            write_report(report, budgets_sha256=sha256)
        if kind == "ours":
            calibrate.check_ours(out, report)
            continue
        with pytest.raises(FileExistsError, match=r"exists and was not written") as caught:
            calibrate.check_ours(out, report)
        assert caught.value.filename == str(out)
    with out.open("wb") as file:
        file.truncate(1 << 40)
    for sha256 in (None, "0" * 64):
        write_report(report, budgets_sha256=sha256)
        with pytest.raises(FileExistsError):
            calibrate.check_ours(out, report)
    out.unlink()
    for content in ("mine", "[]", json.dumps({"format": "mine"})):
        report.write_text(content)
        with pytest.raises(FileExistsError) as caught:
            calibrate.check_ours(out, report)
        assert caught.value.filename == str(report)


def test_nothing_is_drawn_if_the_numbers_beside_it_cannot_be_written(tmp_path):
    pytest.importorskip("matplotlib")
    log = write_log(tmp_path / "log.jsonl", [record(1000, 0.5, True)])
    (tmp_path / "x.csv").write_text("mine")
    words = ["plot", "eval", log, "--out", tmp_path / "x.png", "--csv", tmp_path / "x.csv"]
    assert main([str(word) for word in words]) == 2
    assert not (tmp_path / "x.png").exists()
    assert (tmp_path / "x.csv").read_text() == "mine"


@pytest.mark.parametrize("name", ["x.txt", "x.png"])
def test_a_picture_is_refused_before_the_model_is_opened(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / name).write_text("mine")
    words = ["plot", "plan", tmp_path / "none", "--file", tmp_path / "none"]
    assert main([str(word) for word in [*words, "--out", tmp_path / name]]) == 2
    assert name in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
