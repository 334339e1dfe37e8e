"""Scores: right answers count, results survive a kill, foreign files are left alone."""

import json
import re

import pytest
from vocabularies import byte_level, save, small_vocabulary

from qwen_jax.engine.engine import Engine
from qwen_jax.eval import score, tasks
from qwen_jax.eval.score import Log, Result, ScoreError
from qwen_jax.eval.tasks import Cell
from qwen_jax.tokenizer import Tokenizer

SETTINGS = {"task": "passkey", "seed": 0, "dca": [48, 16]}
CELLS = tasks.grid([1000, 2000], [0.1, 0.9], 1)


class Reader(Engine):
    """A model that finds every key in the first `window` tokens of a prompt."""

    def __init__(self, tokenizer, window):
        self.tokenizer = tokenizer
        self.window = window
        self.asked = []

    def run(self, requests):
        self.asked += requests
        return [self.tokenizer.encode_text(self.read(request.prompt)) for request in requests]

    def read(self, prompt):
        key = re.search(r"pass key is (\d+)", self.tokenizer.decode(prompt[: self.window]))
        return f"The pass key is {key[1]}." if key else "I do not know."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(save(byte_level(*small_vocabulary()), tmp_path_factory.mktemp("small")))


def ask(tokenizer, engine, cells):
    def build(cell):
        return tasks.passkey(tokenizer, cell)

    return list(score.run(engine, tokenizer, cells, build, eos_ids=(7,)))


def result(length=100, depth=0.5, answer="It is 12345."):
    return Result(cell=Cell(length=length, depth=depth), expected="12345", answer=answer)


def test_an_answer_is_right_if_it_contains_the_key(tokenizer):
    results = ask(tokenizer, Reader(tokenizer, window=1200), CELLS)
    assert [each.cell for each in results] == CELLS
    assert score.accuracy(results) == {
        (1000, 0.1): (1, 1),
        (1000, 0.9): (1, 1),
        (2000, 0.1): (1, 1),
        (2000, 0.9): (0, 1),
    }


def test_questions_are_greedy_and_end_at_the_checkpoints_end_tokens(tokenizer):
    reader = Reader(tokenizer, window=1200)
    ask(tokenizer, reader, CELLS[:1])
    assert reader.asked[0].sampling.temperature == 0
    assert reader.asked[0].eos_ids == (7,)


def test_samples_of_a_cell_are_counted_together():
    results = [result(), result(answer="no"), result(length=200)]
    assert score.accuracy(results) == {(100, 0.5): (1, 2), (200, 0.5): (1, 1)}


def test_results_in_a_file_are_not_lost_and_not_asked_again(tmp_path):
    path = tmp_path / "results.jsonl"
    Log(path, SETTINGS).add(result())
    log = Log(path, SETTINGS)
    assert log.results == {Cell(length=100, depth=0.5): result()}
    log.add(result(length=200))
    assert list(Log(path, SETTINGS).results) == [
        Cell(length=100, depth=0.5),
        Cell(length=200, depth=0.5),
    ]


def test_each_line_of_the_file_is_json_with_the_verdict(tmp_path):
    path = tmp_path / "results.jsonl"
    Log(path, SETTINGS).add(result())
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"settings": SETTINGS}
    assert second == {
        "length": 100,
        "depth": 0.5,
        "sample": 0,
        "expected": "12345",
        "answer": "It is 12345.",
        "correct": True,
    }


def test_a_file_cut_off_anywhere_is_continued(tmp_path):
    path = tmp_path / "results.jsonl"
    log = Log(path, SETTINGS)
    log.add(result())
    log.add(result(length=200))
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = Log(path, SETTINGS).results
        assert len(kept) == max(0, sum(end <= cut for end in ends) - 1)
        for each in (result(), result(length=200)):
            if each.cell not in kept:
                Log(path, SETTINGS).add(each)
        assert path.read_bytes() == whole


def test_results_of_other_settings_are_refused_and_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    Log(path, SETTINGS).add(result())
    before = path.read_bytes()
    with pytest.raises(ScoreError, match=r"results.jsonl .*dca \[48, 16\] -> None"):
        Log(path, SETTINGS | {"dca": None})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"a diary", b"a diary\n", b"{}\n", b"[1]\n", b"\xff\xfe\n"])
def test_a_file_that_holds_something_else_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "diary.txt"
    path.write_bytes(content)
    with pytest.raises(ScoreError, match=r"diary\.txt"):
        Log(path, SETTINGS)
    assert path.read_bytes() == content
