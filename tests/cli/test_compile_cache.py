"""Compiled programs that are kept between commands: the same answers, whatever becomes of files."""

import contextlib
import io
import json
import os
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from support.children import run as in_child

from qwen_jax.cli import main
from qwen_jax.files import compile_cache

COMPILED = "/jax/compilation_cache/cache_misses"  # and kept


def test_what_was_kept_comes_back_and_is_marked_as_used(tmp_path):
    path = tmp_path / "a.program"
    compile_cache.write(path, b"code")
    os.utime(path, (0, 0))
    assert compile_cache.read(path) == b"code"
    assert path.stat().st_mtime > 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert compile_cache.read(tmp_path / "b.program") is None


@pytest.mark.parametrize("size", [*range(40), 99])
def test_an_entry_cut_short_is_missing_and_deleted(size, tmp_path):
    path = tmp_path / "a.program"
    compile_cache.write(path, bytes(68))
    path.write_bytes(path.read_bytes()[:size])
    assert compile_cache.read(path) is None
    assert not path.exists()


@pytest.mark.parametrize("at", range(0, 48, 5))
def test_an_entry_with_a_wrong_bit_is_missing_and_deleted(at, tmp_path):
    path = tmp_path / "a.program"
    compile_cache.write(path, bytes(16))
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert compile_cache.read(path) is None
    assert not path.exists()


def test_what_is_no_file_is_missing_and_nobody_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("link")
    for name in ("pipe", "folder", "link"):
        assert compile_cache.read(tmp_path / name) is None


def test_what_was_used_longest_ago_goes_first(tmp_path):
    paths = [tmp_path / f"{number}.program" for number in range(4)]
    for number, path in enumerate(paths[:3]):
        compile_cache.write(path, bytes(68), limit=300)
        os.utime(path, (number, number))
    compile_cache.read(paths[0])
    compile_cache.write(paths[3], bytes(68), limit=300)
    assert sorted(tmp_path.iterdir()) == [paths[0], paths[2], paths[3]]


def test_a_program_over_the_limit_is_not_kept(tmp_path):
    compile_cache.write(tmp_path / "a.program", bytes(300), limit=300)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_kept_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.program").mkdir()
    for path in ("file/a", "a.program", "x" * 300):
        compile_cache.write(tmp_path / path, b"code")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.program", "file"]


def test_a_reader_finds_a_whole_entry_or_none_while_others_write(tmp_path):
    path, contents = tmp_path / "a.program", [bytes([number]) * 9999 for number in range(4)]
    threads = [threading.Thread(target=compile_cache.write, args=(path, each)) for each in contents]
    for thread in threads:
        thread.start()
    found = {compile_cache.read(path) for _ in range(200)}
    for thread in threads:
        thread.join()
    assert found <= {None, *contents}
    assert compile_cache.read(path) in contents


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_directory_that_others_may_write_to_is_not_used(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = compile_cache.directory()
    assert path == tmp_path / "qwen-jax" / "programs"
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(mode)
    assert compile_cache.directory() is None


def test_answers_are_the_same_bit_for_bit_and_errors_of_the_cache_are_silent(tiny, tmp_path):
    assert in_child(answer_often, tiny, tmp_path) == "done"


def answer_often(model: Path, scratch: Path):
    os.environ["XDG_CACHE_HOME"] = str(scratch)
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        os.environ.pop(name, None)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    tokens, directory = scratch / "ids.json", scratch / "qwen-jax" / "programs"
    tokens.write_text(json.dumps([7, 3, 250, 9, 41] * 30))

    def answer(*flags: str) -> tuple[int, list[int], bytes, str]:
        """Programs compiled and kept, an answer, logits, and what was said beside them."""
        jax.clear_caches()
        events.clear()
        out, said = io.StringIO(), io.StringIO()
        common = [str(model), "--tokens", str(tokens), *flags]
        sampled = ["--temperature", "1", "--ignore-eos", "--max-new-tokens", "9", "--json"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            assert main(["generate", *common, *sampled]) == 0
            assert main(["score", *common, "--out", str(scratch / "logits.npz")]) == 0
        logits = np.load(scratch / "logits.npz")["logits"].tobytes()
        kept = events.count(COMPILED)
        return kept, json.loads(out.getvalue())["token_ids"], logits, said.getvalue()

    made, *first = answer()
    files = sorted(directory.iterdir())
    assert made == len(files) > 5
    made, *second = answer()
    assert (made, second) == (0, first)
    assert sorted(directory.iterdir()) == files

    for number, path in enumerate(files):  # cut, changed, or longer
        data = path.read_bytes()
        path.write_bytes(
            (data[: number % 50], data[:40] + b"?" + data[41:], data + b"?")[number % 3]
        )
    made, *third = answer()
    assert (made, third) == (len(files), first)
    assert sorted(directory.iterdir()) == files

    for path in files:  # whole, but nothing that jax can use
        compile_cache.write(path, b"nonsense")
    made, *fourth = answer()
    assert (made, fourth) == (len(files), first)

    made, *last = answer("--no-compile-cache")
    assert (made, last) == (0, first)
    assert COMPILED.replace("misses", "hits") not in events
    return "done"
