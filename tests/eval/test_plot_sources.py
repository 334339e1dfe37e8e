"""Heat maps from files: means by hand, what was not measured, files that cannot be used."""

import csv

import numpy as np
import pytest
from support.plot_files import record, write_log, write_report

from qwen_jax.eval import heatmap, sources
from qwen_jax.eval.heatmap import PlotError
from qwen_jax.eval.log import Log
from qwen_jax.eval.score import Result
from qwen_jax.eval.tasks import Cell

NAN = float("nan")


def test_a_cell_is_the_mean_of_its_answers_and_empty_without_any(tmp_path):
    records = [
        record(2000, 0.5, True),
        record(2000, 0.5, False, sample=1),
        record(2000, 0.5, False, sample=2),
        record(1000, 0.0, False),
        record(1000, 0.5, True),
        record(3000, 0.0, True),
    ]
    panels = sources.scores([write_log(tmp_path / "log.jsonl", records)])
    [shown] = panels.maps
    np.testing.assert_allclose(shown.values, [[0, NAN, 1], [1, 1 / 3, NAN]])
    assert shown.columns.keys == (1000, 2000, 3000)
    assert shown.columns.labels == ("1k", "2k", "3k")
    assert shown.rows.labels == ("0%", "50%")
    assert shown.title == "passkey, dca (1 to 3 answers a cell)"
    assert panels.title == "tiny: mean score"
    assert (shown.low, shown.high) == (0, 1)


def test_a_score_takes_the_place_of_the_verdict(tmp_path):
    records = [
        record(1024, 0.5, False, score=0.75),
        record(1024, 0.5, True, sample=1, score=0.0),
        record(1024, 0.5, True, sample=2, score=None),
    ]
    [shown] = sources.scores([write_log(tmp_path / "log.jsonl", records)]).maps
    np.testing.assert_allclose(shown.values, [[1.75 / 3]])
    assert shown.columns.labels == ("1K",)


def test_tasks_and_variants_have_maps_of_their_own_on_axes_of_their_task(tmp_path):
    records = [
        record(1000, 0.1, True, variant="rope"),
        record(1000, 0.1, True, task="sum", variant="dca"),
        record(2000, 0.9, True, variant="dca"),
        {"length": 5000, "sample": 0, "correct": False, "task": "count", "variant": "rope"},
        record(1000, None, True, task="sum", variant="sparse"),
    ]
    panels = sources.scores([write_log(tmp_path / "log.jsonl", records)])
    found = {shown.title.partition(" (")[0]: shown for shown in panels.maps}
    names = ["passkey, rope", "passkey, dca", "sum, dca", "sum, sparse", "count, rope"]
    assert list(found) == names
    assert panels.across == 2
    np.testing.assert_array_equal(found["passkey, rope"].values, [[1, NAN], [NAN, NAN]])
    np.testing.assert_array_equal(found["passkey, dca"].values, [[NAN, NAN], [NAN, 1]])
    np.testing.assert_array_equal(found["sum, dca"].values, [[1], [NAN]])
    assert found["sum, sparse"].rows.keys == (0.1, None)
    assert found["count, rope"].rows.labels == ("any",)


def test_logs_are_never_mixed(tmp_path):
    (tmp_path / "b").mkdir()
    first = write_log(tmp_path / "a.jsonl", [record(1000, 0.5, True)])
    second = write_log(tmp_path / "b" / "a.jsonl", [record(1000, 0.5, False)], dca=None)
    panels = sources.scores([first, second, first])
    assert [shown.values.item() for shown in panels.maps] == [1, 0]
    assert [shown.title for shown in panels.maps] == [
        "a.jsonl: passkey, dca (1 answer a cell)",
        "a.jsonl: passkey, rope (1 answer a cell)",
    ]


def test_half_a_line_at_the_end_is_left_out(tmp_path):
    path = write_log(tmp_path / "log.jsonl", [record(1000, 0.5, True)])
    path.write_text(path.read_text() + '{"length": 2000, "dep')
    [shown] = sources.scores([path]).maps
    assert shown.columns.keys == (1000,)


@pytest.mark.parametrize(
    ("lengths", "labels"),
    [
        ([1000, 1_000_000], ["1k", "1m"]),
        ([8192, 1 << 20], ["8K", "1M"]),
        ([1000, 8192], ["1,000", "8,192"]),
    ],
)
def test_lengths_are_labelled_as_flags_take_them(tmp_path, lengths, labels):
    records = [record(length, 0.5, True) for length in lengths]
    [shown] = sources.scores([write_log(tmp_path / "log.jsonl", records)]).maps
    assert list(shown.columns.labels) == labels


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", r"log\.jsonl is empty"),
        ("a diary\n", r"log\.jsonl, line 1: Expecting value"),
        ("[1]\n", r"log\.jsonl, line 1: it must be an object"),
        ('{"length": 1}\n', r"log\.jsonl, line 1: settings is missing"),
        ('{"settings": {}}\n', r"log\.jsonl holds no answers yet"),
        ('{"settings": {}}\n\n{"depth": 1}\n', r"log\.jsonl, line 3: length is missing"),
        ('{"settings": {}}\n{"length": 9}\n', r"log\.jsonl, line 2: correct is missing"),
        (
            '{"settings": {}}\n{"length": "9", "correct": true}\n',
            r"log\.jsonl, line 2: length must be an integer, got a text",
        ),
        (
            '{"settings": {}}\n{"length": 9, "correct": true, "depth": 50}\n',
            r"log\.jsonl, line 2: depth must be a number <= 1",
        ),
        (
            '{"settings": {}}\n{"length": 9, "score": NaN}\n',
            r"log\.jsonl, line 2: NaN is no number of JSON",
        ),
    ],
)
def test_a_file_that_is_no_log_is_refused_by_name_and_line(tmp_path, content, named):
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    with pytest.raises(PlotError, match=named):
        sources.scores([path])


def test_a_report_is_shown_at_its_longest_or_at_a_given_length(tmp_path):
    path = tmp_path / "report.json"
    report = write_report(path)
    for length, asked in (("16384", None), ("8192", 8192)):
        panels = sources.recall(path, asked)
        recall, density = panels.maps
        expected = np.array(report["recall"][length])
        np.testing.assert_array_equal(recall.values, expected)
        np.testing.assert_array_equal(density.values, report["density"][length])
        layer, head = divmod(int(expected.argmin()), 2)
        assert recall.title == (
            f"attention recall: mean {expected.mean():.3f}, "
            f"least {expected.min():.3f} (layer {layer}, head {head})"
        )
        assert f"mean {np.mean(report['density'][length]):.3f}" in density.title
        assert panels.title == (
            f"tiny: sparse prefill of {int(length):,} tokens, "
            f"predicted speed-up {report['speedup'][length]:.2f}"
        )
        assert (recall.rows.name, recall.columns.name) == ("layer", "head")
        for shown in panels.maps:
            assert shown.low <= shown.values.min()
            assert shown.values.max() <= shown.high


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": "another 1"}, "format: invalid enum value 'another 1'"),
        ({"recall": {"16384": [[0.5], [0.5, 0.5]]}}, "recall of 16384 tokens is no table"),
        ({"recall": {"16384": [0.5, 0.5]}}, r"recall\[...\]\[0\] must be a list, got"),
        ({"recall": {"16384": [[0.5]]}}, "not of the same layers and heads"),
        ({"density": {"8192": [[0.5]]}}, "density of 16384 tokens is no table"),
        ({"recall": {}}, "recall has no lengths"),
        ({"recall": {"-1": [[0.5]]}}, "a key of recall must be tokens"),
        ({"recall": {"9": [[True]]}}, r"recall\[...\]\[0\]\[0\] must be a number"),
        ({"speedup": [1]}, "speedup must be an object, got a list"),
        ({"model": 5}, "model must be a text, got an integer"),
    ],
)
def test_a_file_that_is_no_report_is_refused_by_name(tmp_path, changes, named):
    path = tmp_path / "report.json"
    write_report(path, **changes)
    with pytest.raises(PlotError, match=named):
        sources.recall(path)
    path.write_text("{")
    with pytest.raises(PlotError, match=r"report\.json is not valid JSON: .*no report"):
        sources.recall(path)


def test_a_length_that_a_report_lacks_is_refused_with_those_it_has(tmp_path):
    write_report(tmp_path / "report.json")
    with pytest.raises(PlotError, match="holds no length 4096: choose --length from 8192, 16384"):
        sources.recall(tmp_path / "report.json", 4096)


def test_the_csv_holds_every_cell(tmp_path):
    records = [
        record(1000, 0.1, True),
        record(2000, None, False, score=0.125, task="sum, or so"),
        record(2000, 0.9, False),
    ]
    panels = sources.scores([write_log(tmp_path / "log.jsonl", records)])
    heatmap.write_csv(panels, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    title = "passkey, dca (1 answer a cell)"
    assert rows == [
        ["map", "depth", "tokens", "value"],
        [title, "0.1", "1000", "1.0"],
        [title, "0.1", "2000", ""],
        [title, "0.9", "1000", ""],
        [title, "0.9", "2000", "0.0"],
        ["sum, or so, dca (1 answer a cell)", "", "2000", "0.125"],
    ]


def test_a_log_of_eval_as_it_is_today_is_read(tmp_path):
    log = Log(tmp_path / "log.jsonl", {"task": "passkey", "model": "m", "dca": None})
    for depth, answer in ((0.1, "It is 12345."), (0.9, "no")):
        cell = Cell(length=1000, task="passkey", depth=depth)
        log.add(Result(cell=cell, expected=("12345",), answer=answer))
    [shown] = sources.scores([tmp_path / "log.jsonl"]).maps
    assert shown.values.tolist() == [[1], [0]]
