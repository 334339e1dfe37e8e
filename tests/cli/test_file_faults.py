"""Whatever the operating system says of a file: one line that names it, and nothing half done."""

import builtins
import errno
import io
import itertools
import os
import re

import pytest
from support.kept import PREFILL, TEXT, checksums

CODES = [
    errno.EIO,
    errno.ESTALE,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EROFS,
    errno.ENOSPC,
    errno.EACCES,
    errno.EDQUOT,
]
VERBS = {
    "inspect": "inspect MODEL",
    "verify": "verify MODEL --full",
    "verify ours": "verify OURS --full",
    "convert": "convert MODEL NEW/ours",
    "export": "export OURS NEW/theirs",
    "generate": "generate MODEL --tokens IDS --greedy --max-new-tokens 1",
    "ask": "ask MODEL Why? --file TEXT --greedy --max-new-tokens 1",
    "prefill": "prefill MODEL --file TEXT --out NEW/kv " + " ".join(map(str, PREFILL)),
    "session": "ask MODEL Why? --kv KV --greedy --max-new-tokens 1",
    "kv inspect": "kv inspect KV",
    "kv verify": "kv verify KV",
    "batch": "batch MODEL IN NEW/out --greedy",
    "score": "score MODEL --tokens IDS --out NEW/logits.npz",
    "export-job": "export-job slurm --topology h100:8 --partition p --time 60 --command true "
    "--compile-cache /c --out NEW/job",
}
PLACES = {
    "stat": (os, "stat"),
    "listing": (os, "scandir"),
    "open": (io, "open"),
    "low open": (os, "open"),
    "directory": (os, "mkdir"),
    "flush": (os, "fsync"),
    "rename": (os, "replace"),
}
LONG = [pytest.param(verb, place, marks=pytest.mark.long) for verb in VERBS for place in PLACES]
SHORT = [
    ("inspect", "open"),
    ("verify", "stat"),
    ("convert", "flush"),
    ("export", "directory"),
    ("ask", "open"),
    ("prefill", "rename"),
    ("kv verify", "low open"),
    ("batch", "flush"),
]


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    from qwen_jax.cli import main

    folder = tmp_path_factory.mktemp("files")
    (folder / "TEXT").write_text(TEXT)
    (folder / "IDS").write_text("1 2 3")
    body = '{"prompt": "ab", "max_tokens": 2}'
    (folder / "IN").write_text(
        f'{{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {body}}}'
    )
    with checksums():
        for command in (
            f"convert {tiny} {folder}/OURS",
            f"prefill {tiny} --file {folder}/TEXT --out {folder}/KV " + " ".join(map(str, PREFILL)),
        ):
            assert main(command.split()) == 0
    return {"MODEL": tiny} | {name: folder / name for name in ("OURS", "KV", "TEXT", "IDS", "IN")}


def failing(patch, place, roots, at, code):
    """Has a function fail from its call number `at` on that is about a file under `roots`."""
    module, name = PLACES[place]
    real, calls = getattr(module, name), itertools.count(1)
    hit = []

    def call(file, *arguments, **more):
        path = name if isinstance(file, int) else os.fspath(file)
        ours = path == "fsync" or str(path).startswith(tuple(map(str, roots)))
        if ours and next(calls) >= at:
            hit.append(path)
            named = () if isinstance(file, int) else (path,)
            raise OSError(code, os.strerror(code), *named)
        return real(file, *arguments, **more)

    patch.setattr(module, name, call)
    if name == "open" and module is io:
        patch.setattr(builtins, name, call)
    return hit


@pytest.mark.parametrize(("verb", "place"), [*SHORT, *LONG])
def test_a_fault_of_a_file_is_one_line(verb, place, files, tmp_path, monkeypatch, run):
    codes = itertools.cycle(CODES)
    for at in range(1, 40):
        new = tmp_path / f"new{at}"
        roots = [*files.values(), new, tmp_path]
        words = VERBS[verb].split()
        for name, path in {**files, "NEW": new}.items():
            words = [re.sub(rf"^{name}\b", str(path), word) for word in words]
        code = next(codes)
        with checksums(), monkeypatch.context() as patch:
            hit = failing(patch, place, roots, at, code)
            got, _, err = run(*words)
        if not hit:
            assert got == 0
            break
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        if got == 0:  # it was of no consequence
            assert not errors
            continue
        assert got == 2, (err, hit)
        assert errors == err.splitlines()[-1:], (err, hit)
        assert "Traceback" not in err
        assert str(tmp_path.parent) in errors[0], (errors, hit)
