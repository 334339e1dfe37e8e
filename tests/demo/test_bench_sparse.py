"""The benchmark of sparse prefill runs; how fast it is, is not asserted."""

import sys

import bench_sparse
import pytest


@pytest.mark.demo
@pytest.mark.long
def test_there_is_a_row_for_every_length_and_layer(monkeypatch, capsys):
    arguments = ["--lengths", "300,400", "--layers", "3", "--slice", "256"]
    monkeypatch.setattr(sys, "argv", ["bench_sparse.py", *arguments])
    bench_sparse.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows if row[0][2].isdigit()] == ["| 300", "| 400", "| 400, 3"]
    assert 0 < float(rows[-1][-2]) <= 1
