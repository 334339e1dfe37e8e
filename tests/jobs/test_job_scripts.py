"""Files of jobs run, with stand-ins for the tools that they call."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings, strategies
from support.places import files

from qwen_jax.jobs import ray_driver

COMMANDS = {
    "words": "printf '%s\\n' a 'b  c' \"d\"",
    "quotes": """printf '%s|' "it's" 'say "x"' it\\'s ''""",
    "dollars": "x=7; printf '%s|' $x ${x}1 '$x' \"$(echo $x)\" '$$(x)' '$$' \\$x",
    "kubernetes": "printf '%s|' '$(JAX_COMPILATION_CACHE_DIR)' '$$(HOSTNAME)' '$(('",
    "lines": "printf '%s|' one\nprintf '%s|' 'two\n  three' \\\n  four\n\techo five\n",
    "semicolons": "false; printf '%s' a; { printf b; } && (printf c) | cat #; not printed",
    "document": "cat <<'END'\n$x `y` \\ \"\nEND\n",
    "signs": "printf '%s|' '#' '*' '?' '[a]' '~' '!' '%' '{}' '&' '\\' '`' 'caf\u00e9 \u4e2d'",
    "yaml": "printf '%s|' '- a: b' '# c' '{{x}}' '&a *a' ': ' '--- x' 'null'",
}


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path):
    """Writes files; runs one of them with a PATH on which stand-ins come first."""
    tools = tmp_path / "bin"
    tools.mkdir()

    class Place:
        directory, bin = tmp_path, tools
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(tmp_path)}

        def write(self, texts):
            for name, text in texts.items():
                (tmp_path / name).write_text(text)

        def start(self, name, **more):
            return subprocess.Popen(
                ["bash", name],
                cwd=tmp_path,
                env=self.environment | more,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        def run(self, name, **more):
            process = self.start(name, **more)
            out, err = process.communicate(timeout=60)
            return process.returncode, out, err

    return Place()


def direct(command: str) -> str:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout


def expanded(text: str, variables: dict[str, str]) -> str:
    """Expands a word of a container's command as Kubernetes does."""

    def one(match):
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", one, text)


def of_a_pod(command: str) -> list[str]:
    """The words that a container of a JobSet runs."""
    manifest = yaml.safe_load(files("jobset", "v5e:4x4", command)["jobset.yaml"])
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]} | {"HOSTNAME": "h"}
    return [expanded(word, variables) for word in container["command"]]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_jobset_runs_the_command_as_it_is(name):
    assert of_a_pod(COMMANDS[name]) == ["/bin/bash", "-c", COMMANDS[name]]


@settings(max_examples=50, deadline=None)
@given(
    strategies.text(
        strategies.sampled_from("$()'\"\\ \n\t#:-|>&*!%@`{}[],?x0~")
        | strategies.characters(exclude_categories=["Cc", "Cs"]),
        min_size=1,
    ).filter(str.strip)
)
def test_yaml_and_kubernetes_hand_on_any_text(command):
    assert of_a_pod(command) == ["/bin/bash", "-c", command]


@pytest.mark.parametrize("name", COMMANDS)
def test_xpk_runs_the_command_as_it_is(name, place):
    """In the block of YAML into which xpk 1.16.0 puts it, and the quotes where GPUs have it too."""
    executable(place.bin / "xpk", "printf '%s\\0' \"$@\" > $OUT/arguments")
    place.write(files("xpk", "v5e:4x4", COMMANDS[name]))
    assert place.run("submit.sh")[0] == 0
    arguments = (place.directory / "arguments").read_text().split("\0")
    (command,) = [each[10:] for each in arguments if each.startswith("--command=")]
    text = f'env: "{command}"\ncommand:\n- bash\n- -c\n- |\n  ({command}) & PID=$!;\n  wait $PID\n'
    container = yaml.safe_load(text)
    assert container["env"] == command
    words = [expanded(word, {"x": "1"}) for word in container["command"]]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout == direct(COMMANDS[name]) != ""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_tpu_vm_runs_the_command_as_it_is(name, place):
    executable(
        place.bin / "sudo",
        'if [ "$2" = rm ]; then exit 1; fi\n'
        'while [ "$1" != --entrypoint ]; do shift; done\n'
        'exec "$2" "${@:4}"',
    )
    place.write(files("gcloud", "v5e:4x4", COMMANDS[name]))
    code, out, err = place.run("job.sh")
    assert (code, out, err) == (0, direct(COMMANDS[name]), "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_node_of_slurm_runs_the_command_as_it_is(name, place):
    executable(place.bin / "srun", 'exec "${@:2}"')
    place.write(files("slurm", "h100:16", COMMANDS[name]))
    code, out, err = place.run("job.sbatch")
    assert (code, out, err) == (0, direct(COMMANDS[name]), "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_task_of_ray_runs_the_command_as_it_is(name, capfd):
    parameters = json.loads(files("ray", "v5e:4x4", COMMANDS[name])["job.json"])
    assert ray_driver.run(parameters["command"], {}) == 0
    assert capfd.readouterr().out == direct(COMMANDS[name])


def test_slurm_requeues_a_preempted_job_and_no_other(place):
    executable(place.bin / "srun", 'exec "${@:2}"')
    executable(place.bin / "scontrol", 'echo "$@"')
    for code in (0, 1, 2, 75, 127, 137):
        place.write(files("slurm", "h100:8", f"exit {code}"))
        found = place.run("job.sbatch", SLURM_JOB_ID="17")
        assert found == (code, "requeue 17\n" if code == 75 else "", "")


def test_slurm_hands_the_signal_on_and_waits(place):
    """The command needs time to save what it has."""
    executable(place.bin / "srun", 'exec "${@:2}"')
    executable(place.bin / "scontrol", 'echo "$@"')
    command = "trap 'sleep 1; echo saved; exit 75' TERM; echo begun; while :; do sleep .05; done"
    place.write(files("slurm", "h100:8", command))
    process = place.start("job.sbatch", SLURM_JOB_ID="17")
    assert process.stdout.readline() == "begun\n"
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert out.splitlines()[0] == "saved"
    assert out.splitlines()[-1] == "requeue 17"


def test_slurm_hands_on_a_signal_that_comes_at_once(place):
    waits = "trap 'exit 75' TERM; kill -TERM $PPID; while :; do sleep .05; done"
    executable(place.bin / "srun", waits)
    executable(place.bin / "scontrol", 'echo "$@"')
    place.write(files("slurm", "h100:8", "exit 0"))
    assert place.run("job.sbatch", SLURM_JOB_ID="17") == (75, "requeue 17\n", "")


GCLOUD = r"""
echo "$3 $4" >> $OUT/log
state=$(cat $OUT/state 2>/dev/null)
case "$4" in
  describe) [ -n "$state" ] && echo "$state" ;;
  create) if [ -n "$REFUSE" ]; then exit 1; fi; echo WAITING_FOR_RESOURCES > $OUT/state ;;
  delete) rm -f $OUT/state ;;
  ssh)
    code=$(head -n 1 $OUT/codes)
    sed -i 1d $OUT/codes
    if [ "$code" = lost ]; then echo SUSPENDED > $OUT/state; exit 255; fi
    exit "$code" ;;
esac
"""


@pytest.mark.parametrize(
    ("codes", "code", "calls"),
    [
        ("0", 0, "create scp ssh delete"),
        ("75 75 75 0", 0, "create scp ssh scp ssh scp ssh scp ssh delete"),
        ("lost lost lost 0", 0, "create scp ssh delete " * 3 + "create scp ssh delete"),
        ("1 1 0", 0, "create scp ssh scp ssh scp ssh delete"),
        ("1 1 1", 1, "create scp ssh scp ssh scp ssh"),
        ("2", 2, "create scp ssh"),
    ],
)
def test_a_tpu_is_rented_used_and_given_back(codes, code, calls, place):
    executable(place.bin / "gcloud", GCLOUD)
    executable(place.bin / "sleep", "echo ACTIVE > $OUT/state")
    place.write(files("gcloud", "v5e:4x4", max_restarts=2))
    (place.directory / "codes").write_text("".join(f"{each}\n" for each in codes.split()))
    found, _, err = place.run("run.sh")
    log = (place.directory / "log").read_text().splitlines()
    verbs = [line.split()[1] for line in log if not line.endswith("describe")]
    assert (found, verbs) == (code, calls.split())
    assert ("bash delete.sh gives the TPU back" in err) == (code != 0)


def test_a_tpu_that_is_refused_is_not_asked_for_without_end(place):
    executable(place.bin / "gcloud", GCLOUD)
    executable(place.bin / "sleep", "")
    place.write(files("gcloud", "v5e:4x4", max_restarts=2))
    code, _, err = place.run("run.sh", REFUSE="1")
    assert code == 1
    assert err == "gave up after 3 failures: bash delete.sh gives the TPU back\n"


@pytest.mark.parametrize(
    ("kind", "topology"),
    [
        ("xpk", "v5e:4x4"),
        ("xpk", "h100:16"),
        ("gcloud", "v6e:2x4"),
        ("slurm", "h200:16"),
        ("ray", "v5e:4x4"),
    ],
)
def test_scripts_are_bash(kind, topology, place):
    for name, text in files(kind, topology, "echo 'a;b' \"$(c)\"").items():
        if text.startswith("#!"):
            done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
            assert (name, done.returncode, done.stderr) == (name, 0, "")


class FakeRay:
    """Stand-in for Ray, with hosts that return these exit codes, one list per attempt."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

    def __init__(self, attempts):
        self.attempts, self.asked, self.released = list(attempts), [], 0
        self.util = self

    def init(self):
        self.started = True

    def placement_group(self, bundles, strategy):
        assert strategy == "STRICT_SPREAD"
        self.codes, self.bundles = self.attempts.pop(0), bundles
        return self

    def remove_placement_group(self, group):
        self.released += 1

    def ready(self):
        return None

    def get_node_ip_address(self):
        raise AssertionError("runs on a host")

    def remote(self, function):
        fake = self

        class Task:
            def options(self, **needs):
                self.needs = needs
                return self

            def remote(self, *arguments):
                if not arguments:
                    return "10.0.0.1"
                fake.asked.append((self.needs, arguments))
                return fake.codes[int(arguments[1]["QWEN_JAX_PROCESS"])]

        return Task()

    def get(self, task):
        if task == "lost":
            raise self.exceptions.RayError("a node died\nmore")
        return task


class Strategies:
    class PlacementGroupSchedulingStrategy:
        def __init__(self, **fields):
            self.fields = fields


@pytest.mark.parametrize(
    ("attempts", "code"),
    [
        ([[0, 0]], 0),
        ([[75, 1], [0, 75], [75, 75], [0, 0]], 0),
        ([[0, 2]], 2),
        ([["lost", 0], [0, 0]], 0),
        ([[1, 0], ["lost", 3]], 1),
    ],
)
def test_a_driver_of_ray_goes_on_as_the_codes_say(attempts, code, place, monkeypatch, capsys):
    fake = FakeRay(attempts)
    modules = {"ray": fake, "ray.util.scheduling_strategies": Strategies}
    monkeypatch.setattr(ray_driver.importlib, "import_module", modules.__getitem__)
    place.write(files("ray", "h100:16", "qwen-jax doctor", max_restarts=1))
    assert ray_driver.main(str(place.directory / "job.json")) == code
    assert fake.attempts == []
    assert fake.released == len(attempts)
    assert fake.bundles == [{"GPU": 8}] * 2
    assert [arguments[1] for _, arguments in fake.asked[:2]] == [
        {"QWEN_JAX_COORDINATOR": "10.0.0.1", "QWEN_JAX_PROCESS": "0"},
        {"QWEN_JAX_COORDINATOR": "10.0.0.1", "QWEN_JAX_PROCESS": "1"},
    ]
    assert all(needs["num_gpus"] == 8 for needs, _ in fake.asked)
    assert capsys.readouterr().err.count("exit codes: ") == len(attempts)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hosts": "2"}, "Expected `int`, got `str` - at `$.hosts`"),
        ({"resource": "CPU"}, "Invalid enum value 'CPU' - at `$.resource`"),
        ({"command": None}, "Expected `str`, got `null` - at `$.command`"),
        ({"hosts": True}, "Expected `int`, got `bool` - at `$.hosts`"),
        ({"max_restarts": -1}, "Expected `int` >= 0"),
        ({"format": "x"}, "Invalid enum value 'x' - at `$.format`"),
        ({"x": 1}, "Object contains unknown field `x`"),
        (None, "is not valid JSON"),
    ],
)
def test_a_driver_of_ray_refuses_parameters_that_nobody_wrote(change, named, place, capsys):
    place.write(files("ray", "h100:16", "qwen-jax doctor", max_restarts=1))
    path = place.directory / "job.json"
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    assert ray_driver.main(str(path)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert named in printed
    assert printed.count("\n") == 1
