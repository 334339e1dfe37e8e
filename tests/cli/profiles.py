"""Profiles: what was run is in the figures and in the trace, however the command ends."""

import contextlib
import json
import os
import signal
import threading

import jax
import numpy as np
import pytest

from qwen_jax.cli import profile
from qwen_jax.cli.profile import ProfileError
from qwen_jax.distributed.multihost import Preempted
from qwen_jax.engine.observer import Step
from qwen_jax.storage import jsonl as journal
from qwen_jax.storage.jsonl import Journal, JournalError

# jaxlib declares it when a trace is read, and Python 3.12 ends where that is an error.
pytestmark = pytest.mark.filterwarnings(
    "ignore:builtin type event_stats has no __module__ attribute:DeprecationWarning"
)


def figures(directory):
    return [json.loads(line) for line in (directory / "steps.jsonl").read_text().splitlines()]


def traced(directory):
    """Names and numbers of the steps in all traces of a directory, by number."""
    found = []
    for path in directory.glob("plugins/profile/*/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats)
                    if "step_num" in stats:
                        found.append((stats["step_num"], event.name))
    return sorted(found)


class Idle:
    """An engine that tells its observer of steps and does nothing."""

    observer = None

    def observe(self, observer):
        self.observer = observer

    def step(self, kind="decode", during=lambda: None):
        assert self.observer is not None
        step = Step(kind=kind, requests=(0,), start=7, tokens=1, size=2, pages=1)
        with self.observer(step):
            during()
            step.compiled = 1


def watched():
    engine = Idle()
    profile.watch(engine)
    return engine


def profiled(directory, steps, *acts):
    """Performs acts on an engine, one after the other, while it is profiled."""
    with profile.running(directory, steps):
        engine = watched()
        for act in acts:
            act(engine)


def test_a_profile_holds_the_steps_that_were_run(tiny, tmp_path, run):
    ids = np.random.default_rng(0).integers(0, 256, 80).tolist()
    (tmp_path / "ids").write_text(json.dumps(ids))
    directory = tmp_path / "new" / "profile"
    flags = ["--greedy", "--ignore-eos", "--max-new-tokens", 5, "--slice", 32, "--json"]
    code, out, err = run(
        "generate", tiny, "--tokens", tmp_path / "ids", *flags, "--profile", directory
    )
    assert code == 0
    steps = figures(directory)
    kinds = ["prefill"] * 3 + ["decode"] * 4
    assert [step["kind"] for step in steps] == kinds
    assert [step["step"] for step in steps] == list(range(7))
    assert [step["start"] for step in steps] == [0, 32, 64, 80, 81, 82, 83]
    assert [step["tokens"] for step in steps] == [32, 32, 16, 1, 1, 1, 1]
    assert [step["size"] for step in steps] == [32, 32, 32, 1, 1, 1, 1]
    assert [bool(step["compiled"]) for step in steps] == [True, False, False, True] + [False] * 3
    answer = json.loads(out)
    assert sum(step["tokens"] for step in steps[:3]) == answer["timings"]["prompt_tokens"] == 80
    assert len(steps[3:]) == len(answer["token_ids"]) - 1
    for step in steps:
        assert (step["requests"], step["engine"], step["replica"]) == ([0], 0, 0)
        assert (step["pages"], step["traced"]) == (1, True)
        assert step["seconds"] > 0
        assert step["peak_bytes"] > 1 << 20
        assert step["density"] is step["recall"] is None
    times = [step["time"] for step in steps]
    assert times == sorted(times)
    assert traced(directory) == list(enumerate(kinds))
    (trace,) = directory.glob("plugins/profile/*")
    assert {step["run"] for step in steps} == {trace.name}
    assert sorted(path.name for path in directory.iterdir()) == ["plugins", "steps.jsonl"]
    assert err.splitlines()[-1] == (
        f"{directory / 'steps.jsonl'}: 7 steps, 0 to 6 traced (--profile-steps); "
        f"`xprof --logdir={directory}` or `tensorboard --logdir={directory}` opens the trace"
    )


def test_a_profile_is_added_to_those_that_are_there(tmp_path):
    profiled(tmp_path, profile.STEPS, Idle.step)
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"run": "killed in a li')
    profiled(tmp_path, profile.STEPS, Idle.step, Idle.step)
    steps = figures(tmp_path)
    assert [step["step"] for step in steps] == [0, 0, 1]
    assert len(traced(tmp_path)) == 3
    runs = sorted(path.name for path in tmp_path.glob("plugins/profile/*"))
    assert [step["run"] for step in steps] == [runs[0], runs[1], runs[1]]


def test_a_trace_ends_after_its_last_step(tmp_path, capsys):
    with profile.running(tmp_path, range(2, 4)):
        first, second = watched(), watched()
        for _ in range(2):
            first.step("prefill")
            second.step()
        assert traced(tmp_path) == [(2, "prefill"), (3, "decode")]
        first.step()
    assert traced(tmp_path) == [(2, "prefill"), (3, "decode")]
    steps = figures(tmp_path)
    assert [step["engine"] for step in steps] == [0, 1, 0, 1, 0]
    assert [step["traced"] for step in steps] == [False, False, True, True, False]
    assert "5 steps, 2 to 3 traced" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [range(0), range(9, 12)])
def test_without_steps_to_trace_there_are_figures_only(tmp_path, capsys, steps):
    with profile.running(tmp_path, steps):
        watched().step()
    assert [path.name for path in tmp_path.iterdir()] == ["steps.jsonl"]
    assert len(figures(tmp_path)) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'steps.jsonl'}: 1 step, none of them traced\n"


def test_without_a_profile_nobody_watches(tmp_path, capsys):
    assert watched().observer is None
    with profile.running(tmp_path / "d", profile.STEPS):
        pass
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == f"--profile {tmp_path / 'd'}: no step was run\n"


def interrupt(engine):
    raise KeyboardInterrupt


def terminate(engine):
    signal.raise_signal(signal.SIGTERM)


def fail(engine):
    engine.step("score", during=lambda: [0] * (1 << 60))


@pytest.mark.parametrize(
    ("act", "end"), [(interrupt, KeyboardInterrupt), (terminate, Preempted), (fail, MemoryError)]
)
def test_a_profile_is_whole_whatever_ends_it(tmp_path, capsys, act, end):
    with pytest.raises(end):
        profiled(tmp_path, profile.STEPS, Idle.step, Idle.step, act)
    assert len(figures(tmp_path)) == 2
    assert traced(tmp_path)[:2] == [(0, "decode"), (1, "decode")]
    assert "2 steps, 0 to" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert watched().observer is None


def test_steps_may_overlap_and_outlive_the_profile(tmp_path):
    def step(entered, go):
        engine.step(during=lambda: entered.set() or go.wait(30))

    goes, threads = [threading.Event() for _ in range(3)], []
    with profile.running(tmp_path, range(2)):
        engine = watched()
        for go in goes:
            entered = threading.Event()
            threads.append(threading.Thread(target=step, args=(entered, go)))
            threads[-1].start()
            assert entered.wait(30)
        for number in (1, 0):
            goes[number].set()
            threads[number].join()
        assert [name for _, name in traced(tmp_path)] == ["decode"] * 2
    goes[2].set()
    threads[2].join()
    assert [line["step"] for line in figures(tmp_path)] == [1, 0]


def test_what_fails_on_the_way_is_said_at_the_end(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def fill_the_disk(_):
        monkeypatch.setattr(journal.os, "write", full)

    one_more = (Idle.step, fill_the_disk, Idle.step, Idle.step)
    with pytest.raises(ProfileError, match="could not be written beyond 1 step:"):
        profiled(tmp_path / "a", range(0), *one_more)
    monkeypatch.undo()
    assert len(figures(tmp_path / "a")) == 1
    with pytest.raises(KeyboardInterrupt):
        profiled(tmp_path / "b", range(0), *one_more, interrupt)
    assert "could not be written beyond 1 step:" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(profile.os, "replace", full)
    with pytest.raises(ProfileError, match=r"the trace could not be written .* No space"):
        profiled(tmp_path / "c", profile.STEPS, Idle.step)
    assert len(figures(tmp_path / "c")) == 1
    assert [path.name for path in (tmp_path / "c").glob("*.*")] == ["steps.jsonl"]


def test_a_directory_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    figures = tmp_path / "steps.jsonl"
    with Journal(figures), pytest.raises(JournalError, match="being written by another run"):
        profile.check(tmp_path)
    profile.check(tmp_path)
    for content, fine in {'{"ru': True, '{"run": "2': True, "{}\n": False, "x": False}.items():
        figures.write_text(content)
        refusal = contextlib.nullcontext() if fine else pytest.raises(ProfileError, match="is not")
        with refusal:
            profile.check(tmp_path)
        assert figures.read_text() == content
    figures.unlink()
    os.mkfifo(figures)
    with pytest.raises(ProfileError, match="is not of a profile"):
        profile.check(tmp_path)
    monkeypatch.setattr(profile.os, "access", lambda *_: False)
    with pytest.raises(ProfileError, match=f"{tmp_path} cannot be written to"):
        profile.check(tmp_path / "new" / "profile")
