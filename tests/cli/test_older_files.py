"""Files of commit ff3859b are read: a checkpoint, a KV session and a batch that was stopped.

`tests/golden/version_0.tar.xz` holds them, of the tiny random model, and the answers of that
commit. The batch has 3 of its 6 results.
"""

import json
import tarfile
from pathlib import Path

import pytest

ARCHIVE = Path(__file__).parents[1] / "golden" / "version_0.tar.xz"


@pytest.fixture
def older(tmp_path, monkeypatch):
    """A working directory with the files; returns what that commit answered."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("expected.json").read_text())


def test_an_older_checkpoint_is_whole_and_answers_as_it_did(older, run):
    code, out, err = run("verify", "checkpoint", "--full")
    assert code == 0, err
    assert "checkpoint is intact: every file and tensor" in out
    asked = older["generate"]
    flags = "--greedy", "--max-new-tokens", str(len(asked["token_ids"])), "--json"
    code, out, err = run("generate", "checkpoint", "--prompt", asked["prompt"], *flags)
    assert code == 0, err
    assert json.loads(out)["token_ids"] == asked["token_ids"]


def test_an_older_session_answers_as_it_did(older, run):
    code, _, err = run("kv", "verify", "session")
    assert code == 0, err
    asked = older["ask"]
    flags = "--greedy", "--max-new-tokens", "12"
    code, out, err = run("ask", "checkpoint", "--kv", "session", asked["question"], *flags)
    assert (code, out) == (0, asked["text"]), err
    assert "session: 312 tokens from the disk" in err


def test_an_older_batch_is_continued_to_the_same_records(older, run):
    begun = Path("answers.jsonl").read_bytes()
    code, _, err = run("batch", "checkpoint", "questions.jsonl", "answers.jsonl")
    assert code == 0, err
    assert "3 answers and 0 errors" in err
    done = Path("answers.jsonl").read_bytes()
    assert done.startswith(begun)
    assert [*map(_timeless, map(json.loads, done.splitlines()))] == [
        *map(_timeless, older["batch"])
    ]


def _timeless(record: dict) -> dict:
    """A record without the second in which it was made."""
    record["response"]["body"].pop("created")
    return record
