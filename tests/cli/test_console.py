"""Tables and streams: whole lines where nobody looks, quiet where nobody reads."""

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.table import Table

import convert
import qwen_jax
from qwen_jax.cli.console import console, print_table, shorten

NAME = "a rather long name of a file, with words in it.txt"
FOLDERS = "/home/somebody/texts/of/all/kinds/in/many/folders"


def on_a_terminal(monkeypatch, write):
    """Returns the output of a function to a stderr that is a terminal."""
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        write()
    shown = b""
    with os.fdopen(reader, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        while part := terminal.read(1 << 16):  # EIO is the end
            shown += part
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", ["1", "20", "80", "400"])
def test_what_is_no_terminal_gets_whole_lines(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    long = f"{FOLDERS * 5}/{NAME}"
    print_table([(long, 12), ("c.txt", 3456)], 3500, 8192)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[1] == f"{long}      12"
    assert len({len(line) for line in lines}) == 1
    table = Table("[bold]a", ":smile:")
    table.add_row("x " * 99, "[red]y[/]")
    console().print(table)
    out = capsys.readouterr().out
    assert "x " * 99 in out
    for text in ("[bold]a", ":smile:", "[red]y[/]"):
        assert text in out


@pytest.mark.parametrize("columns", [30, 62, 80, 200])
def test_a_terminal_gets_whole_names_of_files(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")  # a dumb one has 80
    rows = [(f"{FOLDERS}/{NAME}", 12)]
    shown = on_a_terminal(monkeypatch, lambda: print_table(rows, 3500, 8192))
    lines = shown.splitlines()
    assert len(lines) == 4
    assert NAME in lines[1]
    if columns > len(NAME) + 20:
        assert all(len(line) <= columns for line in lines)
    assert (FOLDERS in lines[1]) == (columns == 200)


@given(
    path=st.lists(st.text("a明/ .", max_size=9), min_size=1, max_size=8).map("/".join),
    width=st.integers(1, 60),
)
def test_a_path_is_shortened_in_its_folders(path, width):
    short, name = shorten(path, width), path.split("/")[-1]
    assert short.split("/")[-1] == name
    if cell_len(path) <= width or "/" not in path:
        assert short == path
    else:
        assert "..." in short.split("/")
        assert cell_len(short) <= width or short == f".../{name}"
        ahead, behind = short.split("...", 1) if path.count("...") == 0 else ("", "")
        assert path.startswith(ahead)
        assert path.endswith(behind)


def test_there_is_one_console():
    for package in (qwen_jax, convert):
        for path in Path(package.__path__[0]).rglob("*.py"):
            if path.name not in ("console.py", "terminal.py"):
                assert "Console(" not in path.read_text(), path


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("--help | true", {0, 1}, ""),
        ("kv inspect nowhere 2>&1 | true", {1, 2}, ""),
        ("--help > /dev/full", {2}, "No space left on device"),
        ("kv inspect nowhere 2> /dev/full", {2}, ""),
        ("--version >&-", {0}, ""),
    ],
)
def test_a_stream_that_nobody_reads(command, code, words, unbuffered):
    python = [sys.executable, "-c", "import sys; from qwen_jax.cli import main; sys.exit(main())"]
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {command}', "bash", *python],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        timeout=100,
    )
    assert done.returncode in code, done
    assert words in done.stderr
    assert done.stderr.count("\n") == bool(words)
    assert done.stdout == ""
