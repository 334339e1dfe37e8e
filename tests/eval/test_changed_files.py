"""Logs of `eval`, reports of `calibrate` and results of batches that somebody changed."""

import json
import random
from pathlib import Path

import pytest
from support.json_mutants import mutated
from support.plot_files import write_report

from qwen_jax.batch.results import Results
from qwen_jax.config import ConfigError
from qwen_jax.eval import sources
from qwen_jax.eval.log import Log
from qwen_jax.eval.score import Result
from qwen_jax.eval.tasks import Cell

COUNTS = [200, pytest.param(10_000, marks=pytest.mark.long)]
SETTINGS = {"model": "tiny", "seed": 0}


def refusal(use, *arguments) -> str | None:
    """The one line in which something is refused, None if it is not."""
    text = None
    try:
        use(*arguments)
    except ConfigError as error:
        text = str(error)
    assert text is None or (text.isprintable() and len(text) < 2000)
    return text


def changed(lines: list[dict], rng: random.Random) -> bytes:
    """JSON lines of which one is a mutant, now and then with damaged bytes."""
    lines = list(lines)
    at = rng.randrange(len(lines))
    lines[at] = mutated(lines[at], rng)
    data = bytearray("".join(json.dumps(line) + "\n" for line in lines).encode())
    if rng.random() < 0.2:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("count", COUNTS)
def test_logs(count, tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, SETTINGS)
    cell = Cell(length=1000, task="passkey", depth=0.5)
    log.add(Result(cell=cell, expected=("12345",), answer="It is 12345."))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rng = random.Random(0)
    refused = 0
    for _ in range(count):
        data = changed(lines, rng)
        path.write_bytes(data)
        refusal(sources.scores, [path])
        if refusal(Log, path, SETTINGS) is not None:
            refused += 1
            assert path.read_bytes() == data
    assert refused > count / 2


@pytest.mark.parametrize("count", COUNTS)
def test_reports(count, tmp_path):
    path = tmp_path / "report.json"
    whole, rng = write_report(path), random.Random(0)
    refused = 0
    for _ in range(count):
        path.write_text(json.dumps(mutated(whole, rng)))
        refused += refusal(sources.recall, path) is not None
    assert refused > count / 2


@pytest.mark.parametrize("count", COUNTS)
def test_results_of_batches(count, tmp_path):
    out, meta = tmp_path / "out", tmp_path / "out.meta"
    Results(out, SETTINGS).__exit__()
    settings = json.loads(meta.read_text())
    response = {"status_code": 200, "request_id": "req_0", "body": {"id": "x"}}
    record = {"id": f"batch_req_{0:032x}", "custom_id": "a", "response": response, "error": None}
    rng = random.Random(0)
    refused = 0

    def use() -> None:
        Results(out, SETTINGS).__exit__()

    for _ in range(count):
        out.write_bytes(changed([record, record | {"custom_id": "b"}], rng))
        meta.write_text(json.dumps(mutated(settings, rng) if rng.random() < 0.3 else settings))
        before = files(tmp_path)
        if refusal(use) is not None:
            refused += 1
            assert files(tmp_path).keys() == before.keys()
            assert files(tmp_path)["out.meta"] == before["out.meta"]
    assert refused > count / 2


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
