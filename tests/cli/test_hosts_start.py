"""Start of a multi-process job: missing and duplicate processes, differing settings."""

import contextlib
import json
import signal
import socket

import pytest
from support.jobs import IDLE, Job

from qwen_jax.distributed import multihost

ADVICE = "start the same command on all hosts"


@pytest.fixture
def start(tiny, tmp_path):
    """Starts processes of a job that does nothing until something happens to it."""

    def begin(count, *more, folder="first", **how):
        return Job(count, tmp_path / folder, tiny, *more, code=IDLE, **how)

    return begin


def connected(port):
    """A connection to process 0, which may not be there yet."""
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except (ConnectionRefusedError, ConnectionResetError):
            pass


@pytest.mark.parametrize("verbose", [[], ["-v"], ["-q"]])
def test_missing_processes_are_named_by_all_that_came(start, verbose):
    with start(4, "--init-timeout", 3, *verbose, numbers=[0, 2]) as job:
        assert job.codes() == [2, 2]
        error = f"processes 1, 3 of 4 did not come to 127.0.0.1:{job.port} in time (--init-timeout)"
        assert job.errors() == [[f"error: {error}: {ADVICE}"]] * 2
        if not verbose:
            assert [len(job.err(index).splitlines()) for index in range(2)] == [2, 2]
        elif verbose == ["-q"]:
            assert [len(job.err(index).splitlines()) for index in range(2)] == [1, 1]


def test_without_a_coordinator_the_others_say_where_they_looked(start):
    with start(2, "--init-timeout", 1, numbers=[1]) as job:
        assert job.codes() == [2]
        (error,) = job.errors()[0]
        assert error == (
            f"error: process 1 of 2 did not find process 0 at 127.0.0.1:{job.port} within 1 s "
            f"(Connection refused): {ADVICE}"
        )


def test_one_number_for_two_processes_is_refused(start):
    with start(3, "--init-timeout", 6, numbers=[0, 1, 1]) as job:
        assert job.codes() == [2, 2, 2]
        first, *others = ("".join(each) for each in job.errors())
        missing = f"error: process 2 of 3 did not come to 127.0.0.1:{job.port} in time"
        twice = "error: another process says it is process 1 of 3 too: give each a --process-id of"
        assert first.startswith(missing)
        said = sorted(others)
        assert said[0].startswith(twice)
        assert said[1].startswith(missing)


def test_one_number_too_many_ends_all_with_a_reason(start):
    with start(2) as job:
        job.wait_for("up")
        with start(2, numbers=[1], port=job.port, folder="second") as second:
            assert second.codes() == [2]
            twice = "another process says it is process 1 of 2 too: give each a --process-id of its"
            assert twice in second.errors()[0][0]
        codes = job.codes(seconds=60)
        assert codes[0] == 2
        assert codes[1] in (2, multihost.LOST)
        assert job.errors()[0][0].startswith(f"error: process 1 of 2 ended: {twice}")


def test_a_second_process_0_is_refused_and_the_first_goes_on(start):
    with start(2) as job:
        job.wait_for("up")
        with start(2, numbers=[0], port=job.port, folder="second") as second:
            assert second.codes() == [2]
            refused = f"error: process 0 cannot listen on 127.0.0.1:{job.port} (Address already"
            assert second.errors()[0][0].startswith(refused)
        job.send(1, signal.SIGTERM)
        assert job.codes() == [multihost.PREEMPTED] * 2


def test_where_process_0_cannot_listen_it_says_so(start):
    with start(2, numbers=[0], own={0: ["--coordinator", "192.0.2.1:8476"]}) as job:
        assert job.codes() == [2]
        assert job.errors()[0][0].startswith("error: process 0 cannot listen on 192.0.2.1:8476 (")


def test_other_numbers_of_processes_are_refused(start):
    with start(2, own={1: ["--num-processes", 3]}) as job:
        assert job.codes() == [2, 2]
        fault = f"--num-processes is 2 on process 0 and 3 on process 1; {ADVICE}"
        assert job.errors() == [[f"error: the processes differ: {fault}"]] * 2


def test_a_number_that_process_0_does_not_know_is_refused(start):
    with start(3, numbers=[0, 2], own={0: ["--num-processes", 2, "--init-timeout", 5]}) as job:
        assert job.codes() == [2, 2]
        fault = f"--num-processes is 3 on process 2 and less than 3 on process 0: {ADVICE}"
        assert job.errors()[1] == [f"error: {fault}"]
        assert job.errors()[0][0].startswith("error: process 1 of 2 did not come to")


def test_other_flags_or_files_are_refused_by_all(start, tiny, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    arguments = ["generate", "--prompt", "The bee"]
    own = {0: [tiny], 1: [model, "--greedy"]}
    with Job(2, model.parent / "job", *arguments, own=own) as job:
        assert job.codes() == [2, 2]
        errors = job.errors()
        assert errors[0] == errors[1]
        assert "--greedy is False on process 0 and True on process 1" in errors[0][0]
        assert "config.json is " in errors[0][0]
        assert "tokenizer.json" not in errors[0][0]


@pytest.mark.parametrize("victim", [0, 1])
def test_the_reason_of_one_that_cannot_take_part_is_told_to_all(tiny, tmp_path, victim):
    arguments = ["generate", tiny, "--prompt", "The bee"]
    own = {victim: ["--sparse-config", tmp_path / "no\x1bwhere"]}
    with Job(2, tmp_path / "job", *arguments, own=own) as job:
        assert job.codes(seconds=60) == [2, 2]
        (reason,) = job.errors()[victim]
        assert "no\\x1bwhere" in reason
        (told,) = job.errors()[1 - victim]
        assert told.startswith(f"error: process {victim} ended: ")
        assert "no\\x1bwhere" in told


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_cannot_take_part_says_so_without_the_others(tiny, tmp_path, number):
    missing = tmp_path / "nowhere"
    arguments = ["generate", tiny, "--prompt", "The bee", "--sparse-config", missing]
    with Job(2, tmp_path / "job", *arguments, numbers=[number]) as job:
        assert job.codes(seconds=60) == [2]
        (error,) = job.errors()[0]
        assert str(missing) in error
        assert len(job.err(0).splitlines()) == 2


def test_strangers_keep_nobody_waiting(start):
    """They say nothing, too little at a time, or what no process says."""
    with start(2, numbers=[0]) as job, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(connected(job.port)) for _ in range(200)]
        for words in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"[" * 100_000 + b"\n",
            b'{"facts": 5}\n',
            b"\xff",
        ):
            with connected(job.port) as stranger, contextlib.suppress(OSError):
                stranger.sendall(words)
        with start(2, numbers=[1], port=job.port, folder="second") as second:
            while "up" not in second.err(0):
                assert second.processes[0].poll() is None, second.err(0)
                with contextlib.suppress(OSError):
                    strangers[0].sendall(b"P")
            job.wait_for("up")
            second.send(0, signal.SIGTERM)
            assert job.codes() + second.codes() == [multihost.PREEMPTED] * 2


def test_ctrl_c_ends_one_that_waits(start):
    with start(2, numbers=[0]) as job:
        connected(job.port).close()
        job.send(0, signal.SIGINT)
        assert job.codes(seconds=60) == [-signal.SIGINT]
