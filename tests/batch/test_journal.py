"""Files of results: whole lines, one writer, nothing lost on a full disk."""

import errno
import os
import resource

import pytest

from qwen_jax.storage import jsonl
from qwen_jax.storage.jsonl import Journal, JournalError, changes


def lines(path):
    return path.read_bytes().splitlines()


def test_whatever_a_line_is_cut_at_the_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 5)
    path = tmp_path / "log"
    with Journal(path) as log:
        log.append({"a": 1}, {"b": "x" * 20})
        log.append({"c": 2})
    whole = path.read_bytes()
    ends = [end + 1 for end, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = max([0, *(end for end in ends if end <= cut)])
        with Journal(path) as log:
            log.repair()
            assert path.read_bytes() == whole[:kept]
            assert log.is_empty == (kept == 0)
            log.append({"d": 3})
            assert list(log.lines()) == [*whole[:kept].splitlines(), b'{"d": 3}']


def test_a_second_writer_is_refused(tmp_path):
    first = Journal(tmp_path / "log")
    with pytest.raises(JournalError, match="log is being written by another run"):
        Journal(tmp_path / "log")
    first.close()
    Journal(tmp_path / "log").close()


def test_a_disk_that_cannot_lock_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(jsonl.fcntl, "flock", refuse)
    with pytest.raises(JournalError, match="log cannot be locked \\(No locks available\\)"):
        Journal(tmp_path / "log")


def test_a_full_disk_loses_nothing_and_can_be_continued(tmp_path):
    path = tmp_path / "log"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as log:
        log.append({"a": 1})
        whole = path.read_bytes()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 30, before[1]))
            with pytest.raises(JournalError, match=r"log: File too large: .* free space and start"):
                log.append({"b": 2}, {"c": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes() == whole
        log.append({"b": 2})
    assert lines(path) == [b'{"a": 1}', b'{"b": 2}']


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "free space"), (errno.EIO, "see to the disk")]
)
def test_a_disk_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch, call, number, says):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    with Journal(tmp_path / "log") as log:
        log.append({"a": 1})
        with monkeypatch.context() as patched:
            patched.setattr(jsonl.os, call, fail)
            with pytest.raises(JournalError, match=f"{os.strerror(number)}.*{says}"):
                log.append({"b": 2})
        assert lines(tmp_path / "log") == [b'{"a": 1}']


def test_an_object_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "settings"
    jsonl.write(path, {"a": 1})
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jsonl.os, "fsync", fail)
    with pytest.raises(JournalError, match="settings: No space left"):
        jsonl.write(path, {"a": 2})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["settings"]


def test_changes_name_what_differs():
    assert changes({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
    assert changes({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": "x"}) == "b 2 -> 3, c None -> 'x'"


@pytest.mark.parametrize("content", [b"", b"{}\n"])
def test_a_line_that_nobody_wrote_is_neither_read_nor_cut_off(content, tmp_path):
    path = tmp_path / "log"
    path.write_bytes(content)
    os.truncate(path, 1 << 40)
    with Journal(path) as log, pytest.raises(JournalError, match="log has a line of over"):
        log.repair()
    assert path.stat().st_size == 1 << 40
    with path.open("ab") as file:
        file.write(b"\n")
    with Journal(path) as log:
        log.repair()
        with pytest.raises(JournalError, match="log has a line of over"):
            list(log.lines())
