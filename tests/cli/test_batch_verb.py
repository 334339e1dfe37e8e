"""The verb `batch` on a tiny checkpoint, with the real engine, killed and started again."""

import json
import os
import signal
import time

import numpy as np
import pytest
from support import batch_child
from support.batches import chat, completion, engine, line, read, write
from support.children import Child

from qwen_jax.batch.run import Totals
from qwen_jax.cli.batch import shown
from qwen_jax.cli.progress import Progress
from qwen_jax.distributed.multihost import PREEMPTED
from qwen_jax.storage.jsonl import Journal

COUNT = 16


def requests():
    """Conversations and completions, greedy and sampled, whose prompts begin alike; and faults."""
    made = []
    for i in range(COUNT):
        sampled = {"temperature": 0.9, "top_p": 0.9} if i % 2 else {}
        body = {"max_tokens": 10 + 3 * i, **sampled}
        prompt = "in the other thing " * (i % 5) + f"{i}"
        made.append(
            chat(f"r{i}", prompt, **body) if i % 4 == 0 else completion(f"r{i}", prompt, **body)
        )
    made.insert(3, b"{")
    made.insert(9, chat("tools", tools=[{"type": "function"}]))
    return made


class Batch:
    """A file of requests and what its results must be."""

    def __init__(self, model, directory):
        self.model, self.source = model, write(directory / "in.jsonl", requests())
        self.compiled = directory / "compiled"
        self.alone = directory / "alone.jsonl"
        assert self.start(self.alone, "--max-seqs", 1).result() == 0
        assert self.start(directory / "out.jsonl").result() == 0
        self.records = read(directory / "out.jsonl")
        self.size = (directory / "out.jsonl").stat().st_size

    def start(self, output, *flags) -> Child:
        return Child(batch_child.batch, self.compiled, self.model, self.source, output, *flags)


@pytest.fixture(scope="module")
def batch(tiny, tmp_path_factory) -> Batch:
    return Batch(tiny, tmp_path_factory.mktemp("batch"))


def wait_for(child, path, size):
    """Waits until a file has so many bytes or the process has ended."""
    while child.alive() and not (path.exists() and path.stat().st_size >= size):
        time.sleep(0.001)


def test_answers_are_those_of_one_request_at_a_time(batch):
    assert len(batch.records) == COUNT + 2
    assert batch.records == read(batch.alone)
    fine = [each for each in batch.records.values() if each["response"]["status_code"] == 200]
    assert len(fine) == COUNT
    for each in fine:
        body = each["response"]["body"]
        assert body["object"] == (
            "chat.completion" if int(each["custom_id"][1:]) % 4 == 0 else "text_completion"
        )
        assert body["usage"]["completion_tokens"] > 0


def test_killed_runs_are_continued_to_the_same_results(batch, tmp_path):
    output, rng = tmp_path / "out.jsonl", np.random.default_rng(0)
    for part in (0, 1, 2):
        child = batch.start(output)
        wait_for(child, output, batch.size * (part + rng.random()) / 3)
        assert child.kill_after(0)
    assert batch.start(output).result() == 0
    assert read(output) == batch.records


@pytest.mark.long
def test_runs_killed_at_random_times_are_continued_to_the_same_results(batch, tmp_path):
    rng, kills, number = np.random.default_rng(1), 0, 0
    began = time.monotonic()
    assert batch.start(tmp_path / "out.jsonl").result() == 0
    usual_s = time.monotonic() - began
    while kills < 30:
        output, number = tmp_path / f"{number}.jsonl", number + 1
        for _ in range(5):
            child = batch.start(output)
            if rng.random() < 0.5:
                wait_for(child, output, batch.size * rng.random())
                kills += child.kill_after(0)
            else:
                kills += child.kill_after(rng.uniform(0, usual_s))
        assert batch.start(output).result() == 0
        assert read(output) == batch.records


def test_sigterm_ends_a_run_with_75_and_a_new_one_goes_on(batch, tmp_path):
    output = tmp_path / "out.jsonl"
    child = batch.start(output)
    wait_for(child, output, batch.size // 3)
    child.signal(signal.SIGTERM)
    assert child.result() == PREEMPTED
    kept = output.read_bytes()
    assert kept.endswith(b"\n")
    assert len(kept) < batch.size
    assert batch.start(output).result() == 0
    assert output.read_bytes().startswith(kept)
    assert read(output) == batch.records


def test_a_finished_batch_loads_nothing(batch, tmp_path, run, monkeypatch):
    monkeypatch.setattr("qwen_jax.llm.model.Model.engine", None)
    before = batch.alone.read_bytes()
    code, out, err = run("batch", batch.model, batch.source, batch.alone, "--price-per-hour", 2)
    assert (code, out) == (0, "")
    assert err.splitlines()[1:] == [f"{batch.alone} holds {COUNT + 2} results, of them 2 errors"]
    assert batch.alone.read_bytes() == before


def test_another_model_or_flag_is_refused(batch, model, run):
    before = batch.alone.read_bytes()
    for flags, change in (
        (["--max-new-tokens", 5], "max_new_tokens 512 -> 5"),
        (["--temperature", 0.5, "--seed", 3], "temperature 0.0 -> 0.5, seed 0 -> 3"),
        (["--dtype", "bf16"], "dtype 'float32' -> 'bfloat16'"),
        (["--max-len", 1000], "max_len 2048 -> 1000"),
        (["--stop", "x"], "stop [] -> ['x']"),
    ):
        code, _, err = run("batch", batch.model, batch.source, batch.alone, *flags)
        assert code == 2
        assert f"{batch.alone} holds results of other settings ({change}): " in err
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"x": 1}))
    code, _, err = run("batch", model, batch.source, batch.alone)
    assert code == 2
    assert "(model '" in err
    assert batch.alone.read_bytes() == before


def test_two_runs_at_once_are_refused(batch, run, tmp_path):
    with Journal(tmp_path / "out.jsonl"):
        code, _, err = run("batch", batch.model, batch.source, tmp_path / "out.jsonl")
    assert code == 2
    assert err.startswith(f"error: {tmp_path / 'out.jsonl'} is being written by another run")


def test_the_summary_has_tokens_errors_and_cost(tiny, tmp_path, run, monkeypatch):
    monkeypatch.setattr("qwen_jax.llm.model.Model.engine", lambda *_, **__: engine())
    lines = [completion(f"r{i}", (1, 2, 3), max_tokens=1, ignore_eos=True) for i in range(3)]
    source = write(tmp_path / "in", [*lines, b"{"])
    code, _, err = run("batch", tiny, source, tmp_path / "out", "--price-per-hour", 3600)
    assert code == 0
    first, cost, last = err.splitlines()
    seconds = first.partition(" in ")[2].partition(" s")[0]
    assert first == f"3 answers and 1 error in {seconds} s: 9 prompt tokens, 3 new"
    dollars = float(cost[1:].partition(",")[0])
    assert dollars == pytest.approx(float(seconds), abs=0.06)
    assert cost == (
        f"${dollars:,.4f}, ${float(cost.split('$')[2].split()[0]):,.6f} a request "
        "(1 x $3,600.00 an hour)"
    )
    assert float(cost.split("$")[2].split()[0]) == pytest.approx(dollars / 4, abs=2e-5)
    assert last == f"{tmp_path / 'out'} holds 4 results, of them 1 error"


def test_a_dry_run_lists_the_tokens_and_plans_without_weights(model, tmp_path, run):
    (model / "model.safetensors").unlink()
    lines = [completion("a", (1, 2, 3)), completion("b", (1,) * 10, max_tokens=90), b"{"]
    source = write(tmp_path / "in", [*lines, line("c\nd", "/v1/x", {})])
    before = sorted(os.listdir(tmp_path))
    flags = ["--topology", "v5e:4x4", "--dry-run", "--price-per-hour", 1, "--max-seqs", 3]
    code, out, err = run("batch", model, source, tmp_path / "out", *flags)
    assert (code, err) == (0, "")
    rows = [each.split(maxsplit=3) for each in out.splitlines()[:5]]
    assert rows[0] == ["line", "prompt", "answer", "custom_id"]
    assert rows[1] == ["1", "3", "512", "a"]
    assert rows[2] == ["2", "10", "90", "b"]
    assert rows[3][:3] == ["3", "error", "(none):"]
    assert rows[4][:2] == ["4", "error"]
    assert "2 requests and 2 errors, 13 prompt tokens, at most 602 new" in out
    assert "the longest is line 1 with 515 tokens" in out
    assert "3 at once of 515 tokens" in out
    assert "verdict  fits" in out
    assert "at the published peak and $0.00" in out
    assert sorted(os.listdir(tmp_path)) == before


def test_a_dry_run_says_what_does_not_fit(model, tmp_path, run):
    source = write(tmp_path / "in", [completion("a", max_tokens=2000)])
    flags = ["--dry-run", "--topology", "v5e:1x1", "--max-seqs", 100_000]
    code, out, _ = run("batch", model, source, tmp_path / "out", *flags)
    assert code == 1
    assert "does not fit" in out


def test_progress_is_a_line_in_ten_seconds_with_what_is_left():
    now, said = [0.0], []
    total, there = Totals(answered=100, work=1100), Totals(answered=10, work=100)
    on_step = shown(Progress(say=said.append, clock=lambda: now[0]), total, there)
    on_step(Totals())
    for second in range(1, 100):
        now[0] = float(second)
        on_step(Totals(answered=second // 2, refused=1, new_tokens=second, work=10 * second))
    assert len(said) == 9
    assert said[0] == "16 of 100 lines, 1 error, 0 + 10 tokens, 90 s left"
