"""Jobs that write files: batches and conversions, which are killed and go on."""

import dataclasses
import json
import shutil
import signal
import time

import pytest
from msgspec import structs
from support import children
from support.batches import chat, completion, read, write
from support.checkpoints import Tiny, assert_trees_equal, expected_tree
from support.jobs import Job

from convert import weights
from qwen_jax.cli import main
from qwen_jax.distributed import multihost
from qwen_jax.models import params

pytestmark = pytest.mark.long

HEARTBEAT = 4
COUNT = 12
FLAGS = ["--greedy", "--dtype", "f32", "--slice", 64, "--mesh", "tensor=2", "--max-seqs", 3]
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
# An embedding, 40 layers and a head, which take seconds.
MODEL = Tiny(layers=40, shards=3, dtype="bfloat16")


def requests():
    made = [b"{", chat("tools", tools=[{"type": "function"}])]
    for i in range(COUNT):
        body = {"max_tokens": 10 + 6 * i, "stop": ["e"] if i % 3 == 0 else None}
        prompt = "in the other thing " * (i % 4) + f"{i}"
        made.append(
            chat(f"r{i}", prompt, **body) if i % 4 == 0 else completion(f"r{i}", prompt, **body)
        )
    return made


def answer_alone(*arguments):
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    assert main([str(argument) for argument in arguments]) == 0


@dataclasses.dataclass
class Batch:
    """A file of requests and what its results must be."""

    arguments: list
    records: dict
    size: int


@pytest.fixture(scope="module")
def batch(tiny, tmp_path_factory):
    """The batch; what one run has compiled is there for the next."""
    directory = tmp_path_factory.mktemp("batch")
    source, output = write(directory / "in.jsonl", requests()), directory / "out.jsonl"
    children.run(answer_alone, "batch", tiny, source, output, *FLAGS)
    records = read(output)
    assert len(records) == COUNT + 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(directory / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield Batch(["batch", tiny, source], records, output.stat().st_size)


def start(batch, folder, count=2, **more):
    arguments = [*batch.arguments, folder / "out.jsonl", *FLAGS, "--heartbeat", HEARTBEAT]
    return Job(count, folder, *arguments, **more)


def wait_for(job, path, size):
    """Waits until a file has so many bytes."""
    while not (path.exists() and path.stat().st_size >= size):
        assert job.processes[0].poll() is None, job.err(0)
        time.sleep(0.01)


def test_a_batch_of_two_processes_has_the_records_of_one(batch, tmp_path):
    output = tmp_path / "out.jsonl"
    with start(batch, tmp_path) as job:
        assert job.codes() == [0, 0], job.err(0) + job.err(1)
        assert f"{output} holds {COUNT + 2} results, of them 2 errors" in job.err(0)
        assert "results" not in job.err(1)
        assert job.errors() == [[], []]
    assert read(output) == batch.records


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_ends_a_batch_after_whole_records(told, batch, tmp_path):
    output = tmp_path / "out.jsonl"
    with start(batch, tmp_path) as job:
        wait_for(job, output, batch.size // 3)
        job.send(told, signal.SIGTERM)
        assert job.codes() == [multihost.PREEMPTED] * 2, job.err(0) + job.err(1)
        said = "stopped by SIGTERM, all 2 processes alike: the same command goes on"
        assert [job.err(index).splitlines()[-1] for index in range(2)] == [said] * 2
    kept = output.read_bytes()
    assert kept.endswith(b"\n")
    assert len(kept) < batch.size
    with start(batch, tmp_path) as job:
        assert job.codes() == [0, 0], job.err(0) + job.err(1)
    assert output.read_bytes().startswith(kept)
    assert read(output) == batch.records


@pytest.mark.parametrize("attempt", range(5))
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_batch_whose_process_dies_ends_and_goes_on(victim, name, attempt, batch, tmp_path):
    output = tmp_path / "out.jsonl"
    with start(batch, tmp_path) as job:
        wait_for(job, output, batch.size * (attempt + 1) // 8)
        job.send(victim, SIGNALS[name])
        assert job.codes(1 - victim, seconds=60) == [multihost.LOST]
        (error,) = job.errors()[1 - victim]
        assert error.startswith(f"error: process {victim}"), error
    with start(batch, tmp_path) as job:
        assert job.codes() == [0, 0], job.err(0) + job.err(1)
    assert read(output) == batch.records


def test_a_dry_run_and_replicas_need_one_process(batch, tmp_path):
    for flags, fault in (
        (["--dry-run"], "--dry-run is for one process: start it once, with --num-processes 1"),
        (["--mesh", "data=2"], "replicas (data=2) share no step"),
    ):
        arguments = [*batch.arguments, tmp_path / "out.jsonl", *flags]
        with Job(2, tmp_path, *arguments) as job:
            assert job.codes() == [2, 2]
            assert all(fault in lines[0] for lines in job.errors()), job.errors()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A model and its conversion by one process."""
    directory = tmp_path_factory.mktemp("convert")
    tensors = MODEL.write(directory / "hf")
    weights.convert(directory / "hf", directory / "ours")
    return directory / "hf", directory / "ours", expected_tree(MODEL, tensors)


def convert(alone, folder, *flags, count=2, **more):
    flags = [*flags, "--heartbeat", HEARTBEAT]
    return Job(count, folder, "convert", alone[0], folder / "ours", *flags, **more)


def assert_same(output, alone):
    """Checks that a checkpoint is whole and equal to that of one process."""
    found, expected = params.verify(output, full=True), params.read_manifest(alone[1])
    # Orbax writes times and random names into its files, of which only tensors are the same.
    assert structs.replace(found, files={}) == structs.replace(expected, files={})
    for name, file in expected.files.items():
        assert name.startswith("params/") or found.files[name] == file
    assert_trees_equal(weights.load(output), alone[2])
    assert not output.with_name(f"{output.name}.partial").exists()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes_share_a_conversion(count, alone, tmp_path):
    with convert(alone, tmp_path, count=count) as job:
        assert job.codes() == [0] * count, job.err(0) + job.err(1)
    assert_same(tmp_path / "ours", alone)


@pytest.mark.parametrize("part", ["embed", "block_000"])
def test_damage_is_found_whoever_reads_it(part, alone, tmp_path):
    shutil.copytree(alone[1], tmp_path / "ours")
    files = [path for path in (tmp_path / "ours" / "params" / part).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with Job(2, tmp_path, "verify", tmp_path / "ours", "--full") as job:
        assert job.codes() == [2, 2], job.err(0) + job.err(1)
        for lines in job.errors():
            assert f"{largest} is damaged: its SHA-256 is not the manifest's" in lines[0]


@pytest.mark.parametrize("form", [0, 1])
def test_a_full_verification_of_three_processes(form, alone, tmp_path):
    with Job(3, tmp_path, "verify", alone[form], "--full") as job:
        assert job.codes() == [0, 0, 0], job.err(0) + job.err(1)
        assert "is intact" in job.out(0)
        assert job.out(1) + job.out(2) == ""


@pytest.mark.parametrize("attempt", range(5))
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_conversion_whose_process_dies_ends_and_goes_on(victim, name, attempt, alone, tmp_path):
    records = tmp_path / "ours.partial" / "parts"
    with convert(alone, tmp_path) as job:
        while len(list(records.glob("*.json"))) <= 3 * attempt:
            assert job.processes[0].poll() is None, job.err(0)
            time.sleep(0.01)
        job.send(victim, SIGNALS[name])
        assert job.codes(1 - victim, seconds=60) == [multihost.LOST]
        (error,) = job.errors()[1 - victim]
        assert error.startswith(f"error: process {victim}"), error
    assert not (tmp_path / "ours").exists()
    count = 1 + attempt % 3
    with convert(alone, tmp_path, "--resume", count=count) as job:
        assert job.codes() == [0] * count, job.err(0)
    assert_same(tmp_path / "ours", alone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("told", [0, 1])
def test_a_stopped_conversion_says_how_to_go_on(told, number, alone, tmp_path):
    records = tmp_path / "ours.partial" / "parts"
    with convert(alone, tmp_path) as job:
        while not any(records.glob("*.json")):
            time.sleep(0.01)
        job.send(told, number)
        assert job.codes() == [130, 130], job.err(0) + job.err(1)
        assert "stopped; continue with: qwen-jax convert " in job.err(told)
        assert f"error: process {told} of 2 ended: it was interrupted" in job.err(1 - told)
    with convert(alone, tmp_path, "--resume") as job:
        assert job.codes() == [0, 0], job.err(0) + job.err(1)
    assert_same(tmp_path / "ours", alone)


def test_processes_that_convert_see_one_disk_and_one_source(alone, tmp_path):
    other = Tiny(layers=1)
    other.write(tmp_path / "other")
    own = {
        0: [alone[0], tmp_path / "ours"],
        1: [tmp_path / "other", tmp_path / "ours"],
    }
    with Job(2, tmp_path, "convert", own=own) as job:
        assert job.codes() == [2, 2]
        assert all("the weights is " in lines[0] for lines in job.errors()), job.errors()
    own = {index: [alone[0], tmp_path / f"{index}" / "ours"] for index in range(2)}
    with Job(2, tmp_path, "convert", own=own) as job:
        assert job.codes() == [2, 2]
        for lines in job.errors():
            assert "onto a file system that all of them see" in lines[0], lines
    assert not json.loads((tmp_path / "0" / "ours.partial" / "state.json").read_text())["replace"]
