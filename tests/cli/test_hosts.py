"""Jobs of several processes: one answer, one end, whatever happens to one of them."""

import dataclasses
import json
import os
import shutil
import signal
import time

import jax
import pytest
from msgspec import structs
from support import children
from support.checkpoints import Tiny, assert_trees_equal, expected_tree
from support.jobs import IDLE, Job

from convert import weights
from qwen_jax.cli import main, on_hosts
from qwen_jax.distributed import multihost
from qwen_jax.models import params

PROMPT = "The bee and the bear"
MESH = "seq=2,tensor=2"
GREEDY = ["--greedy", "--dtype", "f32", "--mesh", MESH]
HEARTBEAT = 4
# Says how many bytes were read of the weights, and how many lie on the device.
LOAD = """
import sys, time
import jax
from pathlib import Path
from convert import weights
from qwen_jax.distributed import multihost as hosts, sharding
from qwen_jax.models import params
from qwen_jax.models.configs import model_config

directory, _, coordinator, _, count, _, process = sys.argv[1:]
hosts.start(
    hosts.find(coordinator, int(count), int(process), 300), lambda: {}, heartbeat=60, timeout=300
)
jax.config.update("jax_num_cpu_devices", 1)
placed = params.shardings(model_config(Path(directory)), sharding.make_mesh(tensor=int(count)))

def read():
    return int(Path("/proc/self/io").read_text().split()[1])

before = read()
tree = weights.load(directory, shardings=placed)
own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
print(read() - before, own, file=sys.stderr, flush=True)
sys.exit(hosts.leave(0))
"""
# Process 1 is killed before it reads the second layer.
DIES = """
import os, signal, sys
from qwen_jax.cli import main
from qwen_jax.storage import orbax_io

def load(folder, target, real=orbax_io.load):
    if folder.name == "block_001" and sys.argv[-1] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(folder, target)

orbax_io.load = load
sys.exit(main())
"""


@pytest.fixture
def idle(tiny, tmp_path):
    """Starts a job that does nothing until something happens to it."""

    def start(count=2, **more):
        return Job(count, tmp_path, tiny, "--heartbeat", HEARTBEAT, code=IDLE, **more)

    return start


def answer_alone(*arguments):
    """Returns the output of one process with as many devices."""
    import contextlib
    import io

    jax.config.update("jax_num_cpu_devices", 4)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(argument) for argument in arguments]) == 0
    return out.getvalue()


def test_two_processes_answer_as_one_does_and_listen_on_loopback_only(tiny, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    arguments = ["generate", tiny, *GREEDY, "--json", "--max-new-tokens", 8]
    # What process 0 alone reads need not be there for the others.
    files = {0: ["--prompt-file", prompt], 1: ["--prompt-file", tmp_path / "nowhere.txt"]}
    for own in files.values():
        own += ["--profile", tmp_path / "profile"]
    with Job(2, tmp_path, *arguments, own=files) as job:
        listening = set()
        while job.processes[0].poll() is None:
            listening |= job.listening()
            time.sleep(0.5)
        assert job.codes() == [0, 0], job.err(0) + job.err(1)
        assert listening
        assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert job.out(1) == ""
        assert f"it listens on 127.0.0.1:{job.port}" in job.err(0)
        found = json.loads(job.out(0))
    alone = json.loads(children.run(answer_alone, *arguments, "--prompt-file", prompt))
    assert found["token_ids"] == alone["token_ids"]
    assert found["text"] == alone["text"]
    assert len(set(found["token_ids"])) > 4
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*")
    assert sorted(path.name[:2] for path in trace.glob("*.xplane.pb")) == ["0-", "1-"]
    lines = (tmp_path / "profile" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["prefill"] + ["decode"] * 7


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_of_one_ends_all_after_the_same_step(idle, told):
    with idle() as job:
        job.wait_for("up")
        job.send(told, signal.SIGTERM)
        assert job.codes() == [multihost.PREEMPTED] * 2, job.err(0) + job.err(1)
        said = [job.err(index).splitlines()[-1] for index in range(2)]
        assert said == ["stopped by SIGTERM, all 2 processes alike"] * 2


@pytest.mark.long
def test_sigterm_ends_an_answer(tiny, tmp_path):
    arguments = [tiny, "What does the bear do?", *GREEDY, "--max-new-tokens", 1900]
    with Job(2, tmp_path, "ask", *arguments) as job:
        job.wait_for("devices as", 0)
        while not job.out(0):
            time.sleep(0.1)
        job.send(1, signal.SIGTERM)
        assert job.codes() == [multihost.PREEMPTED] * 2, job.err(0) + job.err(1)
        for index in range(2):
            assert "stopped by SIGTERM, all 2 processes alike" in job.err(index)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_worker_is_named_and_all_end(idle, number):
    with idle() as job:
        job.wait_for("up")
        job.send(1, number)
        assert job.codes(0, seconds=60) == [multihost.LOST]
        assert job.errors()[0] == [
            f"error: process 1 of 2 did not answer for {HEARTBEAT} s: "
            "killed, stopped or cut off; all end"
        ]


def test_without_its_coordinator_a_worker_ends(idle):
    with idle() as job:
        job.wait_for("up")
        job.send(0, signal.SIGKILL)
        assert job.codes(1, seconds=60) == [multihost.LOST]
        assert job.err(1).splitlines()[1:] == [
            "up",
            f"error: process 0, the coordinator at 127.0.0.1:{job.port}, is gone: "
            "process 1 of 2 ends too",
        ]


def test_proxies_for_http_are_passed_by_and_libraries_are_silent(idle, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_grpc_proxy", "example.com")
    with idle() as job:
        job.wait_for("\nup\n")
        job.send(1, signal.SIGTERM)
        assert job.codes() == [multihost.PREEMPTED] * 2, job.err(0) + job.err(1)
        for index, role in enumerate(["the coordinator; it listens on", "coordinator"]):
            assert job.err(index) == (
                f"process {index} of 2, {role} 127.0.0.1:{job.port}\nup\n"
                "stopped by SIGTERM, all 2 processes alike\n"
            )


def test_no_proxy_keeps_what_it_says(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    multihost.pass_proxies("10.0.0.1")
    assert "no_proxy" not in os.environ
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "localhost,.corp")
    multihost.pass_proxies("10.0.0.1")
    assert os.environ["no_proxy"] == "localhost,.corp,10.0.0.1"
    assert "no_grpc_proxy" not in os.environ  # or gRPC would not read no_proxy


@pytest.mark.long
@pytest.mark.parametrize(
    ("victim", "number"),
    [(2, signal.SIGKILL), (2, signal.SIGSTOP), (0, signal.SIGKILL), (0, signal.SIGSTOP)],
)
def test_of_four_processes_three_end(idle, victim, number):
    others = [index for index in range(4) if index != victim]
    with idle(4) as job:
        job.wait_for("up")
        job.send(victim, number)
        assert job.codes(*others, seconds=60) == [multihost.LOST] * 3
        for index in others:
            (error,) = job.errors()[index]
            assert error.startswith(f"error: process {victim}"), error


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_killed_in_a_step_is_named(tiny, tmp_path, victim):
    arguments = [tiny, "--prompt", PROMPT, "--ignore-eos", *GREEDY, "--max-new-tokens", 1900]
    with Job(2, tmp_path, "generate", *arguments, "--heartbeat", HEARTBEAT) as job:
        while not job.out(0):
            time.sleep(0.1)
        job.send(victim, signal.SIGKILL)
        assert job.codes(1 - victim, seconds=60) == [multihost.LOST]
        *notes, error = job.err(1 - victim).splitlines()
        assert error.startswith(f"error: process {victim}"), error
        assert len(notes) == 1 + victim, notes


@pytest.mark.long
def test_who_is_killed_while_weights_are_loading_is_named(tiny, tmp_path):
    weights.convert(tiny, tmp_path / "ours")
    arguments = [tmp_path / "ours", "--prompt", PROMPT, *GREEDY, "--heartbeat", HEARTBEAT]
    with Job(2, tmp_path, "generate", *arguments, code=DIES) as job:
        assert job.codes(0, seconds=120) == [multihost.LOST], job.err(0)
        (error,) = job.errors()[0]
        assert error.startswith("error: process 1 of 2 did not answer"), error


def test_a_process_that_fails_ends_the_others_with_its_reason(tiny, tmp_path):
    arguments = ["generate", tiny, "--prompt-file", tmp_path / "nowhere.txt", *GREEDY]
    with Job(2, tmp_path, *arguments) as job:
        assert job.codes() == [2, 2]
        reason = f"{tmp_path / 'nowhere.txt'} is missing"
        assert job.errors() == [[f"error: {reason}"], [f"error: process 0 of 2 ended: {reason}"]]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--num-processes", "2"], "--coordinator and --process-id missing"),
        (["--process-id", "1"], "--coordinator and --num-processes missing"),
        (["--num-processes", "0"], "--num-processes 0 must be at least 1"),
        (["--num-processes", "1", "--process-id", "1"], "--process-id 1 must be 0"),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id 2 must be from 0 to 1",
        ),
        (["--coordinator", "a", "--num-processes", "2", "--process-id", "0"], "be HOST:PORT"),
        (["--heartbeat", "0"], "--heartbeat 0 must be at least 1"),
    ],
)
def test_half_a_place_is_refused(tiny, run, arguments, fault):
    code, out, err = run("generate", tiny, "--prompt", PROMPT, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert fault in err


def test_places_come_from_slurm_and_open_mpi(monkeypatch):
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[003-010]",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "0",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    place = multihost.find(None, None, None, 1)
    assert place is not None
    assert (place.coordinator, place.process, place.count) == ("node003:61447", 5, 8)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    assert multihost.find(None, None, 3, 1) == dataclasses.replace(
        place, coordinator="node003:1234", bind="node003:1234", process=3
    )
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0:1234")
    bound = multihost.find("10.0.0.1:9", 2, 1, 1)
    assert bound is not None
    assert (bound.coordinator, bound.bind, bound.detected) == ("10.0.0.1:9", "0.0.0.0:1234", False)
    assert multihost.find(None, 1, None, 1) is None
    # An interactive step: SLURM_NTASKS is of the job.
    for step, count in (("1", None), ("6", 6)):
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", step)
        found = multihost.find(None, None, None, 1)
        assert (found and found.count) == count
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "many")
    with pytest.raises(multihost.ConfigError, match="jax finds slurm but not who is who"):
        multihost.find(None, None, None, 1)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert multihost.find(None, None, None, 1) is None
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    place = multihost.find(None, None, None, 1)
    assert place is not None
    assert (place.coordinator, place.process, place.count) == ("10.96.0.1:1234", 0, 2)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "first")
    with pytest.raises(multihost.ConfigError, match="jax finds ompi but not who is who"):
        multihost.find(None, None, None, 1)


def test_paths_may_differ_between_hosts_but_not_what_a_model_is(tiny, model):
    def facts(directory, **more):
        return on_hosts.facts("generate", {"model": directory, "prompt_file": directory, **more})

    same = facts(tiny, greedy=True)
    assert same == facts(model, greedy=True)
    assert same != facts(model, greedy=False)
    shutil.copy(model / "config.json", model / "generation_config.json")
    assert same != facts(model, greedy=True)


def test_two_processes_share_a_conversion(tmp_path):
    model = Tiny(layers=3, shards=2, dtype="bfloat16")
    expected = expected_tree(model, model.write(tmp_path / "hf"))
    with Job(2, tmp_path, "convert", tmp_path / "hf", tmp_path / "ours") as job:
        assert job.codes() == [0, 0], job.err(0) + job.err(1)
        assert job.out(0).startswith("checkpoint  ")
        assert job.out(1) == ""
    weights.convert(tmp_path / "hf", tmp_path / "alone")
    found, alone = (params.verify(tmp_path / name, full=True) for name in ("ours", "alone"))
    # Files of Orbax have times and random names in them; tensors have neither.
    assert structs.replace(found, files={}) == structs.replace(alone, files={})
    assert_trees_equal(weights.load(tmp_path / "ours"), expected)
    assert not (tmp_path / "ours.partial").exists()


@pytest.mark.parametrize("verb", ["chat", "calibrate", "plot", "bench"])
def test_verbs_of_one_process_do_not_start_in_a_job(verb, tiny, run, monkeypatch, tmp_path):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    arguments = {
        "chat": [tiny],
        "calibrate": [tiny, "--data", tmp_path, "--out", tmp_path / "budgets.json"],
        "plot": ["plan", tiny, "--file", tmp_path],
        "bench": ["kernels"],
    }
    code, out, err = run(verb, *arguments[verb])
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "in one process, but the environment says that this is process 3 of 4: start a" in err


@pytest.mark.long
@pytest.mark.parametrize("form", ["converted", "Hugging Face"])
def test_each_process_reads_its_part_of_the_weights(form, tmp_path):
    model = Tiny(layers=1, hidden=1024, heads=4, kv_heads=2, mlp=1024, vocab=131072)
    model.write(tmp_path / "model")
    directory = tmp_path / "model"
    if form == "converted":
        directory = tmp_path / "ours"
        weights.convert(tmp_path / "model", directory)
    with Job(2, tmp_path, directory, code=LOAD) as job:
        assert job.codes() == [0, 0], job.err(0)
        for index in range(2):
            read, own = map(int, job.err(index).splitlines()[-1].split())
            assert read < 1.2 * own, (read, own)
