"""Reading files and directories: all of a text, or a refusal that names it."""

import gzip
import io
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qwen_jax.cli.console import print_table
from qwen_jax.cli.flags import spelled
from qwen_jax.files import reading
from qwen_jax.llm import documents
from qwen_jax.llm.documents import Document, DocumentError


def read(*paths, exclude=()):
    skipped: list[str] = []
    found = documents.read(paths, skipped=skipped.append, exclude=exclude, spell=spelled)
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
    assert skipped == [f"skipped {tmp_path / name}: it is hidden" for name in (".env", ".git")]
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


def test_what_has_no_end_is_refused(tmp_path):
    link, sparse = tmp_path / "link", tmp_path / "sparse"
    link.symlink_to("/dev/zero")
    sparse.touch()
    os.truncate(sparse, 1 << 40)
    for path, fault in [("/dev/zero", "device"), (link, "device"), (sparse, "more than the")]:
        with pytest.raises(DocumentError, match=fault):
            documents.read_text(Path(path))


def test_a_pipe_is_read_when_somebody_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIPE_SECONDS", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(DocumentError, match="nobody writes"):
        documents.read_text(pipe)
    monkeypatch.setattr(reading, "PIPE_SECONDS", 60)
    code = "import sys, time; f = open(sys.argv[1], 'w'); time.sleep(0.2); f.write('a' * 10**5)"
    with subprocess.Popen([sys.executable, "-c", code, str(pipe)]) as writer:
        assert documents.read_text(pipe) == "a" * 10**5
    assert writer.returncode == 0
    with subprocess.Popen(["sh", "-c", f": > '{pipe}'"]):
        assert documents.read_text(pipe) == ""


def test_standard_input_is_a_file_once(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("déjà".encode())))
    assert read(tmp_path / "a", Path("-"))[0] == [("a", "a"), ("standard input", "déjà")]
    with pytest.raises(DocumentError, match="given twice"):
        read(Path("-"), tmp_path / "a", Path("-"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"%PDF-1.7")))
    with pytest.raises(DocumentError, match="standard input: it is a PDF"):
        read(Path("-"))
    with Path("/dev/zero").open() as endless:
        monkeypatch.setattr("sys.stdin", endless)
        monkeypatch.setattr(documents, "LARGEST_BYTES", 1000)
        with pytest.raises(DocumentError, match="standard input has more than the 1,000 bytes"):
            read(Path("-"))


def zipped(**files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return data.getvalue()


TEXT = "Some words, été.\nAnother line.\n" * 300
CHINESE = "漢字仮名交じり文 テスト\n"


@pytest.mark.parametrize(
    ("content", "way_out"),
    [
        (b"%PDF-1.7\n%\xe2\xe3", "pdftotext"),
        (b"%PDF-1.4\nall of it ASCII", "pdftotext"),
        (zipped(a="x"), "zip archive"),
        (zipped(), "empty zip"),
        (zipped(word__document="x"), "Word document"),
        (zipped(xl__workbook="x"), "Excel document"),
        (zipped(mimetype="application/epub+zip"), "EPUB"),
        (gzip.compress(b"text", mtime=0), "gunzip"),
        (TEXT.encode("utf-16"), "iconv -f UTF-16 "),
        (TEXT.encode("utf-32"), "iconv -f UTF-32 "),
        (TEXT.encode("utf-16-le"), "iconv -f UTF-16LE "),
        (TEXT.encode("utf-16-be"), "iconv -f UTF-16BE "),
        (TEXT.encode("utf-32-le"), "iconv -f UTF-32LE "),
        (TEXT.encode("utf-32-be"), "iconv -f UTF-32BE "),
        (CHINESE.encode("utf-16-le"), "iconv -f UTF-16LE "),
        ((CHINESE * 1000).encode("utf-16-be"), "iconv -f UTF-16BE "),
        ("x".encode("utf-16-le"), "iconv -f UTF-16LE "),
        (("🙂" * 4000).encode("utf-16-le"), "UTF-8"),
        (random.Random(0).randbytes(30_000), "binary"),
        (b"\0" * 3000, "binary"),
        (bytes(range(256)) * 40, "binary"),
        (b"text\0text", "binary"),
        ("déjà vu".encode("latin-1"), "not UTF-8"),
    ],
)
def test_what_users_take_for_text_is_named_with_the_way_out(tmp_path, content, way_out):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DocumentError, match=way_out):
        documents.read_text(tmp_path / "a")


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


FILES = (
    *("a.py", "b.log", "keep.log", "build/c.py", "src/d.py", "src/gen/e.py", "src/gen/deep/f.py"),
    *("docs/build/g.md", "docs/h.tmp", "docs/i.md", "sub/keep.log", "sub/j [1].txt", "sub/ü.txt"),
)


@pytest.mark.parametrize(
    "rules",
    [
        {"": "*.log\n!keep.log\n"},
        {"": "/build/\n"},
        {"": "build\n"},
        {"": "# comment\n\n src/\nsrc/gen/\n", "src": "!gen/\n"},
        {"": "*.py\n", "src": "!d.py\n", "src/gen": "!*.py\n"},
        {"": "src/**/f.py\n**/build\n", "sub": "j*\n"},
        {"": "*\n!*.md\n!docs/\n", "docs": "h.tmp\n"},
        {"": "j\\ \\[1\\].txt\nü.*\n*.lo[fg]\n"},
        {"docs": "/build\n*.tmp\n"},
        {"": "*\n!*/\n!*.py\n"},
        {"": "**/gen/*\n!src/gen/deep/\n", "docs": "**\n"},
        {"": "*.py\n!/src\nsub/*\n!sub/j*\n"},
    ],
)
def test_gitignore_is_read_as_git_reads_it(tmp_path, rules):
    make(tmp_path, *FILES)
    for folder, text in rules.items():
        (tmp_path / folder / ".gitignore").write_text(text)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    expected = {name for name in listed.stdout.decode().split("\0") if name}
    expected = {name for name in expected if not name.endswith(".gitignore")}
    for root in (tmp_path, tmp_path / "docs", tmp_path / "src"):
        below = {tmp_path / name for name in expected if (tmp_path / name).is_relative_to(root)}
        try:
            found = documents.read([root], skipped=lambda line: None)
        except DocumentError:
            found = []
        if root == tmp_path or below:
            assert {Path(each.name) for each in found} == below


def test_a_directory_named_itself_is_not_ignored(tmp_path):
    make(tmp_path, "build/a.txt")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("build/\n")
    assert read(tmp_path / "build")[0] == [("a.txt", "x")]
    with pytest.raises(DocumentError, match="no text files"):
        read(tmp_path)


def test_rules_above_a_directory_count_in_a_repository_only(tmp_path):
    make(tmp_path, "outer/inner/a.txt", "outer/inner/b.log")
    (tmp_path / ".gitignore").write_text("*.txt\n")
    (tmp_path / "outer" / ".gitignore").write_text("*.log\n")
    assert len(read(tmp_path / "outer" / "inner")[0]) == 2
    (tmp_path / "outer" / ".git").mkdir()
    assert read(tmp_path / "outer" / "inner")[0] == [("a.txt", "x")]


def test_patterns_exclude_in_each_directory(tmp_path):
    make(tmp_path, *FILES)
    found, skipped = read(tmp_path, exclude=["*.py", "docs/", "/sub/ü*"])
    assert [name for name, _ in found] == ["b.log", "keep.log", "j [1].txt", "keep.log"]
    assert f"skipped {tmp_path / 'docs'}: --exclude names it" in skipped
    with pytest.raises(DocumentError, match="--exclude is for directories"):
        read(tmp_path / "a.py", exclude=["*.py"])
    with pytest.raises(DocumentError, match="--exclude '!' is no pattern"):
        read(tmp_path, exclude=["!"])


@pytest.mark.parametrize("line", [b"!", b"[z-a]", b"\xff\xfe", b"[[:foo:]]", b"[b-a-c]"])
def test_lines_that_are_no_patterns_are_skipped_as_git_does(tmp_path, line):
    make(tmp_path, *FILES)
    (tmp_path / ".gitignore").write_bytes(line + b"\n*.py\n")
    found, _ = read(tmp_path)
    assert found
    assert not any(name.endswith(".py") for name, _ in found)


def test_a_sibling_is_read_by_its_own_rules(tmp_path, monkeypatch):
    make(tmp_path, "b/data/x.txt", "b/y.txt", "a/.git/HEAD")
    (tmp_path / "a/.gitignore").write_text("data/")
    monkeypatch.chdir(tmp_path / "a")
    assert read(Path("../b"))[0] == read(tmp_path / "b")[0]


def test_many_skipped_files_are_summed_up(tmp_path):
    for number in range(300):
        (tmp_path / f"{number}.bin").write_bytes(b"\0" * (number + 1))
    make(tmp_path, "a.txt", ".hidden", "skip.me")
    _, skipped = read(tmp_path, exclude=["skip.me"])
    assert len(skipped) == 6
    assert skipped[0].startswith(f"skipped {tmp_path / '299.bin'}: it is binary")
    assert skipped[0].endswith("(300 bytes)")
    assert skipped[-1] == (
        "skipped 302 in all: 300 not text, 1 hidden, 1 excluded; the files among them have "
        "45,152 bytes"
    )


def test_names_cannot_speak_to_the_terminal(tmp_path):
    make(tmp_path, "a", "\x1b[31m\nred")
    (tmp_path / "\x1b[31m\nred").write_bytes(b"\0")
    _, (line,) = read(tmp_path)
    assert line.isprintable()


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "a")[0] == [("a", "hello")]


def test_one_document_stands_alone_and_several_are_named():
    one, two = Document(name="a.txt", text="A"), Document(name="b.txt", text="B")
    assert documents.joined([one], "Why?") == "A\n\nWhy?"
    assert documents.joined([one, two], "Why?") == ("File: a.txt\n\nA\n\nFile: b.txt\n\nB\n\nWhy?")
    assert documents.joined([], "Why?") == "Why?"


def test_the_table_names_each_file_its_tokens_and_the_limit(capsys):
    print_table([("a[b].txt", 12), ("c.txt", 3456)], 3500, 8192)
    lines = capsys.readouterr().err.splitlines()[1:]
    expected = ["a[b].txt 12", "c.txt 3,456", "question 3,500", "fits 8,192"]
    for line, words in zip(lines, expected, strict=True):
        name, count = words.split()
        assert name in line
        assert line.rstrip().endswith(count)
