"""Reading files and directories: all of a text, or a refusal that names it."""

import os
from pathlib import Path

import pytest

from qwen_jax.cli import documents
from qwen_jax.cli.documents import Document, DocumentError


def read(*paths):
    skipped: list[str] = []
    found = documents.read(paths, skipped=skipped.append)
    return [(os.path.basename(each.name), each.text) for each in found], skipped


def test_a_directory_is_read_whole_and_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("last")
    (tmp_path / "b" / "a.txt").write_text("inner")
    (tmp_path / "c.md").write_text("漢字")
    (tmp_path / "a.py").write_text("first")
    expected = [("a.py", "first"), ("c.md", "漢字"), ("a.txt", "inner"), ("z.txt", "last")]
    assert read(tmp_path) == (expected, [])


def test_files_come_in_the_order_they_are_named(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "b", tmp_path / "a")[0] == [("b", "b"), ("a", "a")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("image.png", b"\x89PNG\0\0", "binary"),
        ("latin.txt", "déjà".encode("latin-1"), "not UTF-8 (byte 1)"),
    ],
)
def test_what_is_no_text_is_skipped_in_a_directory_and_refused_by_name(
    tmp_path, name, content, reason
):
    (tmp_path / "text").write_text("x")
    (tmp_path / name).write_bytes(content)
    found, skipped = read(tmp_path)
    assert found == [("text", "x")]
    assert len(skipped) == 1
    assert name in skipped[0]
    assert reason in skipped[0]
    with pytest.raises(DocumentError, match=name):
        read(tmp_path / name)


def test_hidden_files_and_directories_are_skipped_with_a_word(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    (tmp_path / ".env").write_text("secret")
    (tmp_path / "a").write_text("a")
    found, skipped = read(tmp_path)
    assert found == [("a", "a")]
    assert skipped == [f"skipped .env, .git in {tmp_path}: hidden"]
    assert read(tmp_path / ".env")[0] == [(".env", "secret")]


def test_links_in_directories_are_not_followed(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a").write_text("a")
    (tmp_path / "outside").write_text("not yours")
    (tmp_path / "inside" / "loop").symlink_to(tmp_path / "inside")
    (tmp_path / "inside" / "escape").symlink_to(tmp_path / "outside")
    found, skipped = read(tmp_path / "inside")
    assert found == [("a", "a")]
    assert len(skipped) == 2
    assert read(tmp_path / "inside" / "escape")[0] == [("escape", "not yours")]


def test_a_pipe_in_a_directory_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").write_text("a")
    assert read(tmp_path) == (
        [("a", "a")],
        [f"skipped {tmp_path / 'pipe'}: it is not a regular file"],
    )


def test_a_directory_without_text_is_refused(tmp_path):
    with pytest.raises(DocumentError, match="holds no text files"):
        read(tmp_path)


def test_devices_are_refused():
    with pytest.raises(DocumentError, match="not a regular file"):
        documents.read_text(Path("/dev/zero"))


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "a")[0] == [("a", "hello")]


def test_one_document_stands_alone_and_several_are_named():
    one, two = Document(name="a.txt", text="A"), Document(name="b.txt", text="B")
    assert documents.joined([one], "Why?") == "A\n\nWhy?"
    assert documents.joined([one, two], "Why?") == ("File: a.txt\n\nA\n\nFile: b.txt\n\nB\n\nWhy?")
    assert documents.joined([], "Why?") == "Why?"


def test_the_table_names_each_file_its_tokens_and_the_limit(capsys):
    documents.print_table([("a[b].txt", 12), ("c.txt", 3456)], 3500, 8192)
    lines = capsys.readouterr().err.splitlines()[1:]
    expected = ["a[b].txt 12", "c.txt 3,456", "question 3,500", "fits 8,192"]
    for line, words in zip(lines, expected, strict=True):
        name, count = words.split()
        assert name in line
        assert line.rstrip().endswith(count)
