"""Files and JSON that nobody vouches for."""

import json
import os
import threading

import pytest

from qwen_jax.files import reading, user_cache
from qwen_jax.files.reading import FileError, parse_json, printable, read_bytes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice"),
        ("[NaN]", "NaN"),
        ("-Infinity", "Infinity"),
        ("[1e999]", "too large"),
        ("1" * 5000, "over 4,300 digits"),
        ("-" + "1" * 5000, "over 4,300 digits"),
        ("[" * 101 + "]" * 101, "100 levels"),
        ('{"a":' * 99_999 + "1", "100 levels"),
        ('"\\ud800"', "lone surrogate"),
        (b"\xff", "UTF-8"),
        ("[1", "delimiter"),
        ("", "Expecting value"),
    ],
)
def test_json_is_refused_with_a_reason(text, why):
    with pytest.raises(ValueError, match=why) as caught:
        parse_json(text)
    assert str(caught.value).isprintable()


def test_json_that_is_valid_is_what_json_says():
    text = '{"a": ["\\ud83d\\ude00", 1, -2.5e3, null, true], "b": {}}'
    assert parse_json(text) == json.loads(text)
    deepest = "[" * 100 + "]" * 100
    assert parse_json(deepest) == json.loads(deepest)
    assert parse_json("1" * 4300) == int("1" * 4300)


@pytest.mark.timeout(60)  # a count per key takes hours
def test_many_keys_take_time_in_proportion():
    keys = ",".join(f'"{number}": 1' for number in range(200_000))
    with pytest.raises(ValueError, match="twice"):
        parse_json(f'{{{keys},"199999": 1}}')


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    for name, why in {
        "pipe": "a pipe",
        "zeros": "a device",
        "loop": "symbolic links",
        "sparse": "bytes, more than",
        "no": "is missing",
        ".": "a directory",
        "n" * 300: "too long",
        "zero\0byte": "null byte",
    }.items():
        with pytest.raises(FileError, match=why) as caught:
            read_bytes(f"{tmp_path}/{name}", limit=1 << 20)
        assert str(caught.value).isprintable()


def test_a_pipe_is_read_where_it_is_asked_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(b"abc" * 100_000))
    writer.start()
    assert read_bytes(pipe, limit=1 << 20, pipes=True) == b"abc" * 100_000
    writer.join()


def test_a_file_that_grows_over_its_limit_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, limit=5) == b"12345"
    with pytest.raises(FileError, match="5 bytes, more than the 4"):
        read_bytes(path, limit=4)


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "\u202eabc", "\ud800", "\x9b31m", "\x7f"])
def test_foreign_text_never_moves_the_cursor(text):
    assert printable(f"{text}é漢").isprintable()
    assert printable(f"{text}é漢").endswith("é漢")


def test_foreign_text_is_cut():
    assert printable("\n" * 1000, limit=50) == ("\\n" * 50)[:49] + "…"
    assert printable("x" * 50, limit=50) == "x" * 50
    assert reading.shown("/a" * 500) == "/a" * 500


def test_the_cache_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = user_cache.directory("programs")
    assert found == tmp_path / "cache/qwen-jax/programs"
    assert found.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/no")
    assert user_cache.directory("programs") is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache.directory("kernels") == tmp_path / ".cache/qwen-jax/kernels"
