"""Runs the tests of `profiles`, which trace, in a process of their own.

libtpu, which other tests load, ends a process that traces without a TPU.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_profiles():
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("profiles.py"))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
