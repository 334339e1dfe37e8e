"""Files are there whole or not at all."""

import os

import pytest

from qwen_jax.storage import atomic


def test_a_file_takes_the_place_of_another(tmp_path):
    path = tmp_path / "file"
    atomic.write(path, "one\n")
    atomic.write(path, b"two \xff")
    assert path.read_bytes() == b"two \xff"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_what_was_there_stays_if_the_disk_fails(call, tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic.write(path, "one")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if call == "open":
            patch.setattr(type(path), "open", fail)
        else:
            patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            atomic.write(path, "two")
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_stranger_put_beside_it_is_not_written_through(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "file.partial").symlink_to(tmp_path / "theirs")
    atomic.write(tmp_path / "file", "ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "file").read_text() == "ours"
    assert not (tmp_path / "file").is_symlink()
