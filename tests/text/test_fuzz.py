"""Mutants of files: accepted with the right ids, or refused in one line; none hangs."""

import subprocess
import sys
from pathlib import Path

import pytest

FORMATS = ("tokenizer.json", "tokenizer_config.json", "template")


def fuzz(kind, seed, count, seconds):
    done = subprocess.run(
        [sys.executable, "-m", "support.fuzz", kind, str(seed), str(count)],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    accepted, refused = map(int, done.stdout.split())
    assert accepted
    assert refused
    assert "panicked" not in done.stderr


@pytest.mark.parametrize("kind", FORMATS)
def test_mutants_are_accepted_or_refused(kind):
    fuzz(kind, 0, 200, 600)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", FORMATS)
def test_ten_thousand_mutants_are_accepted_or_refused(kind):
    fuzz(kind, 1, 10_000, 7200)
