"""Prefills by processes that are stopped and killed, alone and as a job of two."""

import shutil
import signal
import time

import pytest
from support.jobs import Job
from support.kept import TEXT, content

from qwen_jax.distributed import multihost
from qwen_jax.storage import kv_session

pytestmark = pytest.mark.long
HEARTBEAT = 4
ANSWER = ["--greedy", "--dtype", "f32", "--max-new-tokens", 12]
PREFILL = ["--dtype", "f32", "--slice", 32, "--save-every", 96]
MESH = ["--mesh", "seq=2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(2 * TEXT)
    return path


@pytest.fixture(scope="module")
def prefill(tiny, text):
    """Starts a prefill of the text by one process, or by two with a device each."""

    def prefill(count, folder, out, **more):
        folder.mkdir(exist_ok=True)
        mesh = [*MESH, "--heartbeat", HEARTBEAT] if count == 2 else []
        given = ["prefill", tiny, "--file", text, *PREFILL, *mesh]
        return Job(count, folder, *given, *(["--out", out] if out else []), **more)

    return prefill


@pytest.fixture(scope="module")
def whole(prefill, tmp_path_factory):
    """Sessions of prefills that nothing disturbed, by the number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    for count in (1, 2):
        with prefill(count, folder, folder / f"{count}") as job:
            assert job.codes() == [0] * count, job.err(0)
    return {count: folder / f"{count}" for count in (1, 2)}


def saved(directory):
    """Tokens on disk, 0 before there is a session."""
    if not (directory / "session.json").exists():
        return 0
    return kv_session.read(directory).saved


def wait_until_saved(job, directory, more_than):
    until = time.monotonic() + 300
    while saved(directory) <= more_than:
        assert job.processes[0].poll() is None, job.err(0)
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_ended_five_times_loses_nothing(number, prefill, whole, tmp_path):
    kv, before = tmp_path / "kv", 0
    for attempt in range(5):
        with prefill(1, tmp_path / f"{attempt}", kv) as job:
            wait_until_saved(job, kv, before)
            job.send(0, number)
            (code,) = job.codes(seconds=60)
            found = kv_session.read(kv)
            assert found.saved > before
            assert f"{before:,} of " in job.err(0) or not before
            if number == signal.SIGTERM:
                assert code == multihost.PREEMPTED
                assert job.err(0).splitlines()[-1] == (
                    f"stopped: {found.saved:,} of {found.identity.num_tokens:,} tokens are "
                    "saved, the same command goes on there"
                )
            else:
                assert code == -signal.SIGKILL
            before = found.saved
    with prefill(1, tmp_path, kv) as job:
        assert job.codes() == [0], job.err(0)
        assert f"holds {before:,} of " in job.err(0)
    assert content(kv) == content(whole[1])


def test_two_processes_and_one_go_on_after_each_other(tiny, text, whole, tmp_path):
    said = []
    for count, given in (
        (1, ["--file", text]),
        (1, ["--kv", whole[2]]),
        (2, ["--kv", whole[1], *MESH]),
    ):
        with Job(count, tmp_path, "ask", tiny, "Who is it?", *given, *ANSWER) as job:
            assert job.codes() == [0] * count, job.err(0)
            said.append(job.out(0))
    assert said[0] == said[1] == said[2] != ""


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_of_one_saves_in_both(told, prefill, whole, tmp_path):
    kv = tmp_path / "kv"
    with prefill(2, tmp_path, kv) as job:
        wait_until_saved(job, kv, 0)
        job.send(told, signal.SIGTERM)
        assert job.codes(seconds=60) == [multihost.PREEMPTED] * 2, job.err(0) + job.err(1)
        before, total = saved(kv), kv_session.read(kv).identity.num_tokens
        assert before < total
        assert f"stopped: {before:,} of {total:,} tokens are saved" in job.err(0)
        for index in range(2):
            assert "stopped by SIGTERM, all 2 processes alike" in job.err(index)
    with prefill(2, tmp_path, kv) as job:
        assert job.codes() == [0, 0], job.err(0) + job.err(1)
        assert f"holds {before:,} of {total:,} tokens: going on there" in job.err(0)
    assert content(kv) == content(whole[2])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_what_was_saved_stays(victim, prefill, whole, tmp_path):
    kv = tmp_path / "kv"
    with prefill(2, tmp_path, kv) as job:
        wait_until_saved(job, kv, 0)
        killed = time.monotonic()
        job.send(victim, signal.SIGKILL)
        assert job.codes(1 - victim, seconds=60) == [multihost.LOST]
        assert time.monotonic() - killed <= HEARTBEAT + 5
        (line,) = job.errors()[1 - victim]
        assert line.startswith(f"error: process {victim}")
    before = saved(kv)
    with prefill(2, tmp_path, kv) as job:
        assert job.codes() == [0, 0], job.err(0) + job.err(1)
        assert f"holds {before:,} of " in job.err(0)
    assert content(kv) == content(whole[2])


def test_a_directory_that_is_not_shared_is_refused(prefill, whole, tiny, tmp_path):
    # The other process has nothing, or a session of the same prompt that others have written.
    shutil.copytree(whole[2], tmp_path / "a")
    shutil.copytree(whole[1], tmp_path / "b")
    for other in ("nothing", "b"):
        own = {0: ["--out", tmp_path / "a"], 1: ["--out", tmp_path / other]}
        with prefill(2, tmp_path, None, own=own) as job:
            assert job.codes() == [2, 2], job.err(0)
            for errors in job.errors():
                assert f"{tmp_path / other} is not the same directory for all proc" in errors[0]
    own = {0: ["--kv", tmp_path / "a"], 1: ["--kv", whole[1]]}
    with Job(2, tmp_path, "ask", tiny, "Who?", *ANSWER, *MESH, own=own) as job:
        assert job.codes() == [2, 2], job.err(0)
        assert "is not the same directory for all processes" in job.errors()[1][0]
