"""Scores: what an answer contains counts, results survive a kill, foreign files are left alone."""

import json
import re

import pytest
from support import readers

from qwen_jax.engine.request import Sparseness
from qwen_jax.eval import catalog, score
from qwen_jax.eval.log import Log, LogError
from qwen_jax.eval.material import Material
from qwen_jax.eval.score import Result
from qwen_jax.eval.tasks import Cell

SETTINGS = {"task": "passkey", "seed": 0, "dca": [48, 16]}
CELLS = catalog.grid(["passkey"], [1000, 2000], [0.1, 0.9], 1)
SPARSE = Sparseness(density=0.5, recall=0.75, least_recall=0.25, pairs=10, tokens=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return readers.small(tmp_path_factory.mktemp("small"))


def ask(tokenizer, engine, cells):
    material = Material(tokenizer)

    def build(cell):
        return catalog.KINDS[cell.task].build(material, cell)

    return list(score.run(engine, tokenizer, cells, build, eos_ids=(7,)))


def reader(tokenizer, window, **more):
    """A model that finds every key in the first `window` characters of a prompt."""

    def read(text):
        key = re.search(r"pass key is (\d+)", text[:window])
        return f"The pass key is {key[1]}." if key else "I do not know."

    return readers.Reader(tokenizer, read, **more)


def result(length=100, depth=0.5, answer="It is 12345.", **more):
    cell = Cell(task="passkey", length=length, depth=depth)
    return Result(cell=cell, expected=("12345",), answer=answer, **more)


def test_an_answer_is_right_if_it_contains_the_key(tokenizer):
    results = ask(tokenizer, reader(tokenizer, window=1200), CELLS)
    assert [each.cell for each in results] == CELLS
    assert [each.score for each in results] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("", 0),
        ("ABCDE and then 12345", 1),
        ("abcde, 1234", 0.5),
        ("12345 12345", 0.5),
        ("ABC DE", 0),
    ],
)
def test_an_answer_scores_the_share_of_what_is_expected(answer, share):
    cell = Cell(task="vt", length=100)
    assert Result(cell=cell, expected=("12345", "ABCDE"), answer=answer).score == share


def test_questions_are_greedy_and_end_at_the_checkpoints_end_tokens(tokenizer):
    engine = reader(tokenizer, window=1200)
    ask(tokenizer, engine, CELLS[:1])
    assert engine.asked[0].sampling.temperature == 0
    assert engine.asked[0].eos_ids == (7,)
    assert engine.asked[0].max_new_tokens == 24


def test_how_a_prompt_was_prefilled_is_kept(tokenizer):
    [kept] = ask(tokenizer, reader(tokenizer, window=1200, sparse=SPARSE), CELLS[:1])
    assert kept.sparse == SPARSE


def test_a_mean_weighs_scores_alike_and_sparseness_by_its_extent():
    more = Sparseness(density=1.0, recall=1.0, pairs=30, tokens=12)
    found = score.mean([result(sparse=SPARSE), result(answer="no"), result(sparse=more)])
    assert (found.total, found.asked, found.score) == (2, 3, 2 / 3)
    assert (found.density, found.recall) == ((0.5 + 3) / 4, (0.75 + 3) / 4)
    assert score.mean([result()]).density is None


def test_results_in_a_file_are_not_lost_and_not_asked_again(tmp_path):
    path = tmp_path / "results.jsonl"
    Log(path, SETTINGS).add(result())
    log = Log(path, SETTINGS)
    assert log.results == {(None, result().cell): result()}
    others = [result(length=200), result(variant="dca"), result(variant="sparse", sparse=SPARSE)]
    for other in others:
        log.add(other)
    assert list(Log(path, SETTINGS).results.values()) == [result(), *others]


def test_each_line_of_the_file_is_json_with_the_verdict(tmp_path):
    path = tmp_path / "results.jsonl"
    Log(path, SETTINGS).add(result())
    Log(path, SETTINGS).add(result(variant="sparse", sparse=SPARSE))
    first, second, third = map(json.loads, path.read_text().splitlines())
    assert first == {"settings": SETTINGS}
    assert second == {
        "task": "passkey",
        "variant": None,
        "length": 100,
        "depth": 0.5,
        "sample": 0,
        "expected": ["12345"],
        "answer": "It is 12345.",
        "score": 1.0,
    }
    sparse = {"density": 0.5, "recall": 0.75, "least_recall": 0.25, "pairs": 10, "tokens": 4}
    assert third == second | {"variant": "sparse", "sparse": sparse}


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
            if (None, each.cell) not in kept:
                Log(path, SETTINGS).add(each)
        assert path.read_bytes() == whole


def test_results_of_other_settings_are_refused_and_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    Log(path, SETTINGS).add(result())
    before = path.read_bytes()
    with pytest.raises(LogError, match=r"results.jsonl .*dca \[48, 16\] -> None"):
        Log(path, SETTINGS | {"dca": None})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"a diary", b"a diary\n", b"{}\n", b"[1]\n", b"\xff\xfe\n"])
def test_a_file_that_holds_something_else_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "diary.txt"
    path.write_bytes(content)
    with pytest.raises(LogError, match=r"diary\.txt"):
        Log(path, SETTINGS)
    assert path.read_bytes() == content
