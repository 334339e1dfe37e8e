"""The scripts that read schedules, on what the compiler wrote once."""

import sys

import pytest
import tpu_compile
import tpu_schedule

pytestmark = pytest.mark.optimized

USE = """\
== CAPACTIY:
MATMUL, XLU, VLOAD:FILL, VSTORE:SPILL
    4     3     3     1
== UTILIZATION:
0 0 0 0
4 1 0 1
2 0 3 0
1 0 0 0
0 2 0 0
"""
BUNDLES = """\
LH: loop header
= control target key end

     0   :  { %s1 = smov.u32 3 }
   0x1 LB: > { %2 = vmatmul.bf16 }
   0x2   : > { %3 = vmatmul.bf16 ;;  %694 = sbr.rel (%p4) target = $region5 }
   0x3   : > { %4 = vmatmul.bf16 }
   0x4 PF: > { %5 = vsetiar }
"""


@pytest.fixture
def dump(tmp_path):
    (tmp_path / "17-other.1-70-final_hlo-static-per-bundle-utilization.txt").write_text("x")
    (tmp_path / "17-mine.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(USE)
    (tmp_path / "17-mine.1-72-final_bundles.txt").write_text(BUNDLES)
    return tmp_path


def test_a_schedule_counts_bundles_matmuls_spills_and_the_inner_piece(dump):
    found = tpu_compile.schedule_of(dump, "mine.1")
    assert (found.bundles, found.matmuls, found.slots, found.spills) == (5, 7, 4, 4)
    assert found.inner == (2, 6)
    assert found.mxu == 7 / 20
    assert found.inner_mxu == 6 / 8


def schedule(**changes):
    sizes = {"bundles": 10, "matmuls": 20, "slots": 4, "inner": (5, 15), "spills": 1}
    return {"name": "k.1"} | sizes | changes


def test_the_table_has_a_row_for_each_kernel_and_the_ratio_to_the_better_splash(
    monkeypatch, capsys
):
    rows = [
        {"program": "splash 1 x 2"} | schedule(matmuls=10),
        {"program": "splash 3 x 4"} | schedule(matmuls=16),
        {"program": "prefill"} | schedule(),
        {"program": "decode", "error": "no room"},
    ]
    monkeypatch.setattr(tpu_schedule, "in_child", lambda *_: [dict(row) for row in rows])
    monkeypatch.setattr(sys, "argv", ["tpu_schedule.py", "--generations", "v5e"])
    assert tpu_schedule.main() == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[2:] == [
        "| v5e | splash 1 x 2 | 10 | 10 | 4 | 0.250 | 0.750 | 1 |  |",
        "| v5e | splash 3 x 4 | 10 | 16 | 4 | 0.400 | 0.750 | 1 |  |",
        "| v5e | prefill: k.1 | 10 | 20 | 4 | 0.500 | 0.750 | 1 | 1.25 |",
    ]
    assert err == "v5e, decode: no room\n"
