"""Budgets from the command line: found, kept over a kill, read again and drawn."""

import dataclasses
import json
import os

import numpy as np
import pytest

from qwen_jax.engine.engine import Engine
from qwen_jax.llm.model import Model
from qwen_jax.models.configs import last_q, model_config, sparse_config
from qwen_jax.storage import atomic

SLICE = ("--slice", 64)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """About 700 tokens without order."""
    letters = np.random.default_rng(0).integers(97, 123, 700).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(letters.tobytes())
    return path


@pytest.fixture(scope="module", autouse=True)
def engines():
    """Engines of equal flags are one, large enough for all, whose steps are compiled once."""
    build, made = Model.engine, {}

    def engine(self, length, **more):
        assert length <= 1024
        key = self.directory, dataclasses.replace(self.options, mesh=None)
        if key not in made:
            made[key] = build(self, 1024, **more)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "engine", engine)
        yield


@pytest.fixture
def surveyed(monkeypatch):
    """Lengths of the texts that were surveyed; `stop_after` many, the user presses Ctrl-C."""

    class Calls(list):
        stop_after = None

    calls, survey = Calls(), Engine.survey

    def counted(self, tokens, grid):
        if len(calls) == calls.stop_after:
            raise KeyboardInterrupt
        calls.append(len(tokens))
        return survey(self, tokens, grid)

    monkeypatch.setattr(Engine, "survey", counted)
    return calls


@pytest.fixture
def calibrate(tiny, text, tmp_path, run):
    def calibrate(*more, out="b.json", target=0.8):
        fixed = ("calibrate", tiny, "--data", text, "--out", tmp_path / out, *SLICE)
        return run(*fixed, "--lengths", "160,300,160", "--target-recall", target, *more)

    return calibrate


def test_budgets_are_found_read_and_drawn(calibrate, surveyed, tiny, text, tmp_path, run):
    code, out, err = calibrate()
    assert code == 0
    assert surveyed == [160, 300]
    assert [line.split(":")[0] for line in out.splitlines()] == ["160 tokens", "300 tokens"]
    budgets, report = tmp_path / "b.json", tmp_path / "b.report.json"
    assert err.splitlines()[-1] == f"wrote {budgets} and {report}"
    assert sorted(os.listdir(tmp_path)) == ["b.json", "b.report.json"]
    found = sparse_config(tiny, model_config(tiny), budgets)
    figures = json.loads(report.read_text())
    assert figures["format"] == "qwen-jax calibration 1"
    assert (figures["target_recall"], figures["margin"]) == (0.8, 0.02)
    assert figures["lengths"] == [160, 300]
    assert figures["vertical"] == [list(row) for row in found.vertical]
    assert figures["slash"] == [list(row) for row in found.slash]
    for recall in figures["recall"].values():
        assert np.mean(recall) >= 0.8 - 1e-4
    for length in ("160", "300"):
        assert figures["speedup"][length] >= 1

    sparsely = ("--sparse", "on", "--sparse-config", budgets, "--dense-tail", 0, *SLICE)
    answer = ("--greedy", "--max-new-tokens", 2, "--json")
    code, out, err = run("generate", tiny, "-v", "--prompt-file", text, *answer, *sparsely)
    assert code == 0
    assert "sparse prefill of prompts over 0 tokens" in err
    assert 0 < json.loads(out)["sparse"]["density"] < 1

    code, out, _ = run("plot", "recall", report, "--length", 160)
    assert code == 0
    assert "recall" in out

    plan = ("plot", "plan", tiny, "--file", text, "--tokens", 300, *sparsely[2:])
    code, out, err = run(*plan, "--head", 3)
    assert code == 0
    assert "layer 0, head 3" in " ".join(out.split())
    assert not err
    png = tmp_path / "plan.png"
    code, out, err = run(*plan, "--out", png)
    assert (code, out) == (0, "")
    assert err.splitlines()[-1] == f"wrote {png}"
    assert png.read_bytes().startswith(b"\x89PNG")
    code, _, err = run(*plan, "--layer", 1)
    assert code == 2
    assert err.splitlines()[-1] == "error: --layer 1 must be from 0 to 0"
    code, _, err = run(*plan, "--head", 4)
    assert code == 2
    assert err.splitlines()[-1] == "error: --head 4 must be from 0 to 3"


@pytest.mark.parametrize(("target", "short"), [(0.3, False), (0.95, True)])
def test_held_out_text_in_which_less_is_found_is_said(calibrate, tmp_path, target, short):
    repeated = tmp_path / "repeated.txt"
    repeated.write_text("aaaa" * 100)
    code, out, err = calibrate("--held-out", repeated, "--margin", 0, target=target)
    assert code == 0
    found = out.split("held-out text:")[1]
    least = min(float(line.split("recall ")[1][:5]) for line in found.splitlines() if line)
    assert (least < target) == short
    assert (f"falls short of --target-recall {target}: give more kinds" in err) == short


def test_a_killed_calibration_goes_on_and_ends_as_if_it_had_not_been(calibrate, surveyed, tmp_path):
    two = ("--samples", 2)
    assert calibrate(*two, out="whole.json")[0] == 0
    assert surveyed == [160, 160, 300, 300]
    surveyed.clear()
    surveyed.stop_after = 3
    assert calibrate(*two)[0] == 130
    assert not (tmp_path / "b.json").exists()
    surveyed.clear()
    surveyed.stop_after = None
    code, _, err = calibrate(*two, target=1)  # out of reach: what was measured stays
    assert code == 2
    assert "out of reach" in err.splitlines()[-1]
    assert surveyed == [300]
    code, _, err = calibrate(*two)
    assert code == 0
    assert surveyed == [300]
    assert err.count(f"{tmp_path / 'b.progress'} holds text") == 4
    for name in ("{}.json", "{}.report.json"):
        ours, whole = (tmp_path / name.format(stem) for stem in ("b", "whole"))
        assert ours.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "b.progress").exists()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("stopped", ["report", "budgets"])
def test_a_calibration_killed_while_it_writes_its_files_is_repeated(
    again, stopped, calibrate, tmp_path, monkeypatch
):
    """Before it writes the report or the budgets, over none or over those of another target."""
    budgets = tmp_path / "b.json"
    before = None
    if again:
        assert calibrate(target=0.3)[0] == 0
        before = budgets.read_bytes()
    write = atomic.write
    name = {"report": "b.report.json", "budgets": "b.json"}[stopped]

    def killed(path, content):
        if path.name == name:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(atomic, "write", killed)
    assert calibrate(target=0.99)[0] == 130
    assert (budgets.read_bytes() if budgets.exists() else None) == before
    monkeypatch.setattr(atomic, "write", write)
    assert calibrate(target=0.97)[0] == 0  # other budgets than those that were not written
    assert budgets.read_bytes() != before
    assert calibrate(target=0.99)[0] == 0
    budgets.write_text("mine")
    code, _, err = calibrate()
    assert code == 2
    assert f"error: {budgets}: exists and was not written by this command" in err


@pytest.mark.parametrize("flag", ["--out", "--report"])
def test_files_where_texts_are_kept_are_refused_first(flag, calibrate, surveyed, tmp_path):
    code, _, err = calibrate(flag, tmp_path / "b.progress")
    assert code == 2
    assert f"error: {tmp_path / 'b.progress'} is where texts are kept" in err.splitlines()[-1]
    assert not surveyed


def test_samples_of_other_settings_are_not_taken(calibrate, surveyed, text, tmp_path):
    surveyed.stop_after = 1
    assert calibrate()[0] == 130
    (kept,) = (tmp_path / "b.progress").iterdir()
    (tmp_path / "other.txt").write_text("x" * 400)
    for more in (
        ("--slice", 32),
        ("--lengths", "160,600"),  # with larger budgets to survey
        ("--samples", 2),
        ("--data", tmp_path / "other.txt"),
        ("--dca", "on", "--dca-chunk", 64, "--dca-local", 8),
        ("--dtype", "bf16"),
        ("--kernels", "reference"),
        ("--vllm-parity",),
    ):
        surveyed.clear()
        surveyed.stop_after = 0
        assert calibrate(*more)[0] == 130
        assert "holds text" not in calibrate(*more)[2]
    kept.write_bytes(b"")
    code, _, err = calibrate()
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {kept} is damaged")


@pytest.mark.parametrize(
    "more",
    [
        ("--max-len", 1000),
        ("--mesh", "seq=1"),
        ("--sparse", "off"),
        ("--dense-tail", 0, "--least-recall", 0.5),
    ],
)
def test_flags_that_change_no_sample_lose_none(calibrate, surveyed, more):
    surveyed.stop_after = 1
    assert calibrate()[0] == 130
    code, _, err = calibrate(*more)
    assert code == 130
    assert err.count("holds text") == 1
    assert surveyed == [160]


def test_voters_are_those_of_the_checkpoint_with_budgets_or_without(model):
    assert last_q(model) == 64
    path = model / "config.json"
    dual = {"chunk_size": 512, "local_size": 128, "original_max_position_embeddings": 256}
    dual["sparse_attention_last_q"] = 32
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"dual_chunk_attention_config": dual})
    )
    assert last_q(model) == 32
