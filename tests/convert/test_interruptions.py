"""Conversions that are stopped: the old output or the new one, whole, and a way to go on."""

import itertools
import shutil
import time

import numpy as np
import pytest
from support.checkpoints import Tiny, assert_trees_equal, expected_tree
from support.children import Child, convert, read, run, stage, sums

from convert import weights
from qwen_jax.models import params


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("replaced", [True, False])
def test_an_output_is_whole_whichever_step_of_publishing_is_the_last(exchange, replaced, tmp_path):
    for step in itertools.count(1):
        output = tmp_path / f"{step}"
        if replaced:
            stage(output, "old")
        arguments = (stage, output, "new")
        options = {"exchange": exchange, "overwrite": replaced}
        child = Child(*arguments, **options, die_at=step)
        if not child.killed():
            break
        if output.exists():
            assert read(output) in (["old", "new"] if replaced else ["new"])
        elif replaced:
            assert not exchange
            partial = tmp_path / f"{step}.partial"
            assert read(partial / "old") == "old"
            assert read(partial / "checkpoint") == "new"
        run(*arguments, **options)
        assert read(output) == "new"
        assert not (tmp_path / f"{step}.partial").exists()
    assert step > 10
    assert read(output) == "new"


def test_conversions_killed_at_random_times_leave_the_old_output_and_can_be_resumed(tmp_path):
    old, new = Tiny(layers=1), Tiny(layers=2, shards=2, dtype="bfloat16")
    old.write(tmp_path / "old hf", 1)
    expected = expected_tree(new, new.write(tmp_path / "new hf", 2))
    arguments = (convert, tmp_path / "new hf")
    sums_old = run(convert, tmp_path / "old hf", tmp_path / "old")
    began = time.monotonic()
    sums_new = run(*arguments, tmp_path / "clean")
    usual_s = time.monotonic() - began
    rng = np.random.default_rng(0)
    kills = 0
    for number in range(40):
        output = tmp_path / f"{number}"
        replace = number % 2 == 0
        if replace:
            shutil.copytree(tmp_path / "old", output)
        for attempt in range(3):
            child = Child(*arguments, output, overwrite=replace and not attempt, resume=attempt > 0)
            kills += child.kill_after(rng.uniform(0, usual_s * [1, 0.7, 0.5][attempt]))
            if replace or output.exists():
                assert sums(params.verify(output, full=True)) in (sums_old, sums_new)
        assert run(*arguments, output, resume=True, overwrite=replace) == sums_new
        assert sums(params.verify(output, full=True)) == sums_new
        assert not output.with_name(f"{number}.partial").exists()
        if kills >= 30:
            break
    assert kills >= 30
    assert_trees_equal(weights.load(output), expected)
