"""Arrays on disk: an error is one sentence, after all that was begun has ended."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.storage import orbax_io
from qwen_jax.storage.manifest import CheckpointError

# Without a limit on files, then with some: a disk that is full sooner or later.
CHILD = """
import pathlib, resource, signal, sys
import numpy as np
from qwen_jax.storage import orbax_io
from qwen_jax.storage.manifest import CheckpointError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
arrays = {name: np.ones((4, 1000, 64), np.float32) for name in "abcdef"}
folder = pathlib.Path(sys.argv[1])
for limit in [-1, 0, 10, 1000, 100_000, 900_000]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
        orbax_io.save(folder / "part", arrays, alone=True)
        print("saved")
    except CheckpointError as error:
        print(error)
"""
ODD = ["[v2]", "a*b?", "{a,b}", "%41#x", "a b\n", "~", "-x", "é漢", "$HOME"]


def test_a_full_disk_is_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    full = f"{tmp_path / 'part'} cannot be written: File too large"
    assert done.stdout.splitlines() == ["saved", *[full] * 5]


@pytest.mark.parametrize("name", ODD)
def test_any_name_can_hold_arrays(name, tmp_path):
    folder = tmp_path / name / name
    arrays = {"a": {"b": np.arange(6.0).reshape(2, 3)}, "c": np.zeros(2, np.float32)}
    folder.parent.mkdir()
    for _ in range(2):  # over what an earlier attempt has left
        orbax_io.save(folder, arrays, alone=True)
    found = orbax_io.load(folder, {"a": {"b": np.empty((2, 3))}, "c": np.empty(2, np.float32)})
    np.testing.assert_array_equal(found["a"]["b"], arrays["a"]["b"])


@pytest.mark.parametrize(
    "path",
    [
        "/gs/bucket/x",
        "/s3/x",
        "/hf/x/y",
        "/tmp/gs:/x",
        b"/tmp/\xff".decode("utf8", "surrogateescape"),
    ],
)
def test_a_path_that_orbax_takes_for_another_is_refused(path):
    with pytest.raises(CheckpointError, match=r"name another"):
        orbax_io.check_path(Path(path))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"a": np.empty(3, np.float32)}, r"a is float32\(2,\) instead of float32\(3,\)"),
        ({"a": np.empty(2, np.int32)}, r"a is float32\(2,\) instead of int32\(2,\)"),
        ({"b": np.empty(2, np.float32)}, "holds no array b"),
        ({}, "holds an unknown array a"),
    ],
)
def test_other_arrays_are_refused(target, message, tmp_path):
    orbax_io.save(tmp_path / "x", {"a": np.zeros(2, np.float32)}, alone=True)
    with pytest.raises(CheckpointError, match=message):
        orbax_io.load(tmp_path / "x", target)
