"""Files of jobs match the schemas and option lists of the tools that read them.

flags.json holds the flags that each tool names in its help, of the version beside them; gcloud's
are those of `gcloud meta lint-gcloud-commands`, and sbatch's help leaves out --open-mode, which its
parser takes. JobSet's schema is that of kubeflow-trainer-api (Apache-2.0), which is generated from
JobSet's and Kubernetes' own.
"""

import copy
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError
from support.places import PLACES, files, job

from qwen_jax.config import ConfigError
from qwen_jax.jobs import accelerators
from qwen_jax.jobs.job import numbered
from qwen_jax.planner import devices

FLAGS = json.loads((Path(__file__).parent / "flags.json").read_text())

HOSTS = {
    # topology: (hosts, chips of each, machine, hosts that xpk makes, accelerator type)
    "v4:2x2x1": (1, 4, "ct4p-hightpu-4t", 1, "v4-8"),
    "v4:2x2x4": (4, 4, "ct4p-hightpu-4t", 4, "v4-32"),
    "v5e:1x1": (1, 1, "ct5lp-hightpu-1t", 1, "v5litepod-1"),
    "v5e:2x2": (1, 4, "ct5lp-hightpu-4t", 1, "v5litepod-4"),
    "v5e:2x4": (1, 8, "ct5lp-hightpu-8t", 2, "v5litepod-8"),
    "v5e:4x4": (4, 4, "ct5lp-hightpu-4t", 4, "v5litepod-16"),
    "v5e:16x16": (64, 4, "ct5lp-hightpu-4t", 64, "v5litepod-256"),
    "v5p:2x2x2": (2, 4, "ct5p-hightpu-4t", 2, "v5p-16"),
    "v5p:4x4x8": (32, 4, "ct5p-hightpu-4t", 32, "v5p-256"),
    "v6e:2x4": (1, 8, "ct6e-standard-8t", 2, "v6e-8"),
    "v6e:4x8": (8, 4, "ct6e-standard-4t", 8, "v6e-32"),
    "tpu7x:2x2x1": (1, 4, "tpu7x-standard-4t", 1, None),
    "tpu7x:4x4x4": (16, 4, "tpu7x-standard-4t", 16, None),
    "h100:8": (1, 8, "a3-highgpu-8g", 1, None),
    "h100:32": (4, 8, "a3-highgpu-8g", 4, None),
    "h200:1": (1, 1, "a3-ultragpu-8g", 1, None),
}


@pytest.mark.parametrize("name", HOSTS)
def test_a_topology_is_so_many_hosts(name):
    count, chips, machine, xpk_count, vm_type = HOSTS[name]
    topology = devices.topology(name)
    hosts = accelerators.hosts(topology)
    assert (hosts.count, hosts.chips, hosts.machine) == (count, chips, machine)
    assert hosts.count * hosts.chips * topology.device.per_chip == topology.count
    assert accelerators.hosts(topology, whole=False).count == xpk_count
    if vm_type is not None:
        assert hosts.vm_type == vm_type


def test_jobs_run_on_every_device_that_the_planner_knows():
    for kind, device in devices.DEVICES.items():
        if device.platform == "cpu":
            continue
        topology = devices.topology(f"{kind}:{'x'.join('221'[: device.dims])}")
        if device.platform == "gpu":
            assert re.search(r"gres=gpu:[12]\n", files("slurm", topology.name)["job.sbatch"])
        found = json.loads(files("ray", topology.name)["job.json"])
        assert found["hosts"] * found["chips"] == topology.chips


@pytest.mark.parametrize("kind", ["jobset", "xpk"])
def test_devices_that_a_scheduler_does_not_know_are_refused(kind):
    with pytest.raises(ConfigError, match="has no l40s: there are v4, v5e"):
        files(kind, "l40s:8")


def validated(manifest):
    """The manifest, if JobSet's schema knows every field of it."""
    bare = copy.deepcopy(manifest)
    (container,) = pod_of(bare)["containers"]
    # The schema's type of quantities takes none at all.
    resources = container.pop("resources")
    assert set(resources) == {"requests", "limits"}
    assert all(isinstance(size, int) for each in resources.values() for size in each.values())
    JobsetV1alpha2JobSet.model_validate(bare, extra="forbid")
    return manifest


def job_of(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(manifest):
    return job_of(manifest)["template"]["spec"]


@pytest.mark.parametrize("name", HOSTS)
def test_a_jobset_is_what_its_schema_says(name):
    count, chips, *_ = HOSTS[name]
    for more in ({}, {"bucket": None, "claim": "c", "spot": True, "service_account": "s"}):
        manifest = validated(yaml.safe_load(files("jobset", name, **more)["jobset.yaml"]))
        spec, pod = job_of(manifest), pod_of(manifest)
        assert spec["completions"] == spec["parallelism"] == count
        (container,) = pod["containers"]
        resource = "google.com/tpu" if ":" in name and "x" in name.split(":")[1] else None
        resource = resource or "nvidia.com/gpu"
        assert container["resources"]["limits"] == {resource: chips}
        names = {each["name"] for each in pod["volumes"]}
        assert names == {each["name"] for each in container["volumeMounts"]}


@pytest.mark.parametrize("path", ["restartPolicies", "nodeselector", "claim"])
def test_the_schema_finds_a_field_that_is_none(path):
    manifest = yaml.safe_load(files("jobset", "v5e:4x4")["jobset.yaml"])
    pod_of(manifest)[path] = "x"
    with pytest.raises(ValidationError, match=path):
        validated(manifest)


def test_pods_find_the_slice_and_each_other():
    manifest = yaml.safe_load(files("jobset", "v5e:4x4", name="long-texts")["jobset.yaml"])
    assert pod_of(manifest)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    network = manifest["spec"]["network"]
    assert network["enableDNSHostnames"]
    assert network["subdomain"] == "long-texts"
    assert job_of(manifest)["completionMode"] == "Indexed"
    ports = [each["containerPort"] for each in pod_of(manifest)["containers"][0]["ports"]]
    assert ports == [8471, 8476]


def test_preemption_restarts_a_jobset_without_being_counted():
    manifest = yaml.safe_load(files("jobset", "v5e:4x4", max_restarts=3)["jobset.yaml"])
    spec, policy = job_of(manifest), manifest["spec"]["failurePolicy"]
    exit_code, disruption = spec["podFailurePolicy"]["rules"]
    assert exit_code["onExitCodes"]["values"] == [75]
    assert exit_code["onExitCodes"]["containerName"] == pod_of(manifest)["containers"][0]["name"]
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {each["action"] for each in (exit_code, disruption)} == {"FailJob"}
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["maxRestarts"] == 3
    # Both are conditions of pod failure policies.
    assert pod_of(manifest)["restartPolicy"] == "Never"
    assert spec["backoffLimit"] == 0


def test_gpus_of_several_hosts_are_told_who_they_are():
    flags = "--num-processes 2 --process-id"
    for kind, first in (("jobset", "a-hosts-0-0.a:8476"), ("xpk", "a-slice-job-0-0.a:8476")):
        text = "".join(files(kind, "h100:16", name="a").values())
        assert f"qwen-jax doctor --coordinator {first} {flags}" in text
        assert "--coordinator" not in "".join(files(kind, "h100:8").values())
    parameters = json.loads(files("ray", "h200:16")["job.json"])
    assert parameters["command"].endswith('--num-processes 2 --process-id "$QWEN_JAX_PROCESS"')


@pytest.mark.parametrize(
    "command",
    ["a; b", "a\nb", "a && b", "(a)", "a | b", "a > b", "a # b", "a $(b)", "a 'b", 'a "b', "a \\"],
)
def test_flags_are_not_added_to_what_is_not_one_command(command):
    with pytest.raises(ConfigError, match=r"must be one command|is not closed"):
        numbered(command, "c:1", 2, "0")


@pytest.mark.parametrize("command", ["a 'b;c'", 'a "b | $(c)" d', "a b\\;c", "a b#c", "a 'x\ny'"])
def test_flags_are_added_after_quotes(command):
    assert numbered(command, "c:1", 2, "0") == (
        f"{command} --coordinator c:1 --num-processes 2 --process-id 0"
    )


def flags_of(line):
    return {each.split("=")[0] for each in shlex.split(line) if re.match(r"--[a-z]", each)}


def calls(texts, tool):
    """Every call of a tool in scripts, without what follows in the line."""
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            for found in re.findall(rf"(?<![\w-]){tool} (?:'[^']*'|[^'|&;{{])*", line):
                yield found.split(" -- ")[0] if tool.startswith("ray") else found


@pytest.mark.parametrize(
    ("kind", "tool"),
    [
        ("gcloud", "gcloud compute tpus queued-resources create"),
        ("gcloud", "gcloud compute tpus queued-resources describe"),
        ("gcloud", "gcloud compute tpus queued-resources delete"),
        ("gcloud", "gcloud compute tpus tpu-vm scp"),
        ("xpk", "xpk workload create"),
        ("ray", "ray job submit"),
    ],
)
def test_a_tool_has_every_flag_that_it_gets(kind, tool):
    more = {"spot": True} if kind == "gcloud" else {}
    more |= {"storage": "s"} if kind == "xpk" else {}
    scripts = [
        text
        for name, text in files(kind, "v5e:4x4", **more).items()
        if name.endswith(".sh") and text.startswith("#!")
    ]
    found = [flags_of(call) for call in calls(scripts, tool)]
    assert found
    for flags in found:
        assert len(flags) > 1
        assert flags <= set(FLAGS[tool]["flags"])


def test_ssh_reaches_all_hosts():
    run = files("gcloud", "v5e:4x4")["run.sh"]
    (call,) = re.findall(r"tpu-vm ssh (.*\n.*)\|\|", run)
    flags = flags_of(call.replace("\\\n", " "))
    assert flags <= set(FLAGS["gcloud compute tpus tpu-vm ssh"]["flags"])
    assert "--worker=all" in call


@pytest.mark.parametrize("topology", ["h100:8", "h200:2", "h100:32"])
def test_sbatch_has_every_option_that_it_gets(topology):
    text = files("slurm", topology, account="lab")["job.sbatch"]
    options = dict(
        re.fullmatch(r"#SBATCH (--[a-z-]+)=?(.*)", line).groups()
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )
    assert set(options) <= set(FLAGS["sbatch"]["flags"])
    assert flags_of(next(iter(calls([text], "srun"))).split("bash -c")[0]) <= set(
        FLAGS["srun"]["flags"]
    )
    count, chips = {"h100:8": (1, 8), "h200:2": (1, 2), "h100:32": (4, 8)}[topology]
    assert options["--nodes"] == str(count)
    assert options["--gres"] == f"gpu:{chips}"
    assert options["--ntasks-per-node"] == "1"
    assert options["--signal"] == "B:TERM@120"
    assert "--requeue" in options
    assert f"JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(chips)))}\n" in text
    # Options after the first command are not read.
    assert text.rindex("#SBATCH") < text.index("set -uo")


@pytest.mark.parametrize("kind", PLACES)
def test_every_job_has_a_compile_cache_and_all_the_memory(kind):
    topology = "v5e:4x4" if kind == "gcloud" else "h200:8"
    text = "".join(files(kind, topology, compile_cache="/data/programs").values())
    assert re.search(r"JAX_COMPILATION_CACHE_DIR\W+(value: )?\W?/data/programs", text)
    variable = "JAX_COORDINATOR_PORT" if kind == "gcloud" else "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert variable in text


def test_a_driver_of_ray_asks_for_whole_hosts():
    found = json.loads(files("ray", "v6e:4x4")["job.json"])
    asked = [found[name] for name in ("hosts", "chips", "resource", "topology", "tpu")]
    assert asked == [4, 4, "TPU", "4x4", "v6e"]
    environment = yaml.safe_load(files("ray", "v6e:4x4")["runtime_env.yaml"])
    assert set(environment) == {"env_vars"}
    assert all(isinstance(value, str) for value in environment["env_vars"].values())


REFUSED = {
    ("jobset", "cpu:8"): "jobs run on one of v4",
    ("jobset", "v5e:3x4"): "v5e has 1x1, 2x2",
    ("jobset", "v5p:2x2x3"): "v5p has 2x2x1, 2x2x2, 2x2x4, 2x4x4 and those of which every side",
    ("jobset", "h100:12"): "several hosts have 8 GPUs each, so take 8 or 16",
    ("xpk", "v5e:2x2"): "xpk has v5e from 8 chips on",
    ("xpk", "h100:4"): "xpk has whole hosts of 8 GPUs",
    ("gcloud", "h100:8"): "gcloud rents TPU VMs, not h100",
    ("gcloud", "tpu7x:2x2x1"): "take jobset or xpk for others",
    ("gcloud", "v5p:4x4x16"): "v5p-512 is 4x8x8, not 4x4x16",
    ("gcloud", "v4:4x4x12"): "v4-384 has no one topology",
    ("slurm", "v5e:4x4"): "slurm runs GPUs, not v5e",
}


@pytest.mark.parametrize(("kind", "topology"), REFUSED)
def test_what_nobody_rents_is_refused(kind, topology):
    with pytest.raises(ConfigError, match=re.escape(REFUSED[kind, topology])):
        files(kind, topology)


def test_a_job_says_what_it_is_missing():
    for kind, missing in {
        "jobset": "--image, --claim or --bucket",
        "xpk": "--image, --project, --zone, --cluster, --compile-cache",
        "gcloud": "--image, --project, --zone, --bucket",
        "ray": "--compile-cache",
        "slurm": "--partition, --time, --compile-cache",
    }.items():
        topology = "h100:8" if kind == "slurm" else "v5e:4x4"
        nothing = dict.fromkeys(PLACES[kind][1])
        with pytest.raises(ConfigError, match=f"^{kind} also needs {missing}$"):
            files(kind, topology, **nothing)


def test_what_a_scheduler_cannot_use_is_refused():
    for kind, flag, value in [
        ("jobset", "partition", "gpu"),
        ("xpk", "spot", True),
        ("gcloud", "namespace", "n"),
        ("ray", "image", "i"),
        ("ray", "grace", 5),
        ("slurm", "max_restarts", 1),
    ]:
        topology = "h100:8" if kind == "slurm" else "v5e:4x4"
        with pytest.raises(ConfigError, match=rf"^--{flag.replace('_', '-')} has no effect with"):
            files(kind, topology, **{flag: value})
    with pytest.raises(ConfigError, match="--claim and --bucket: give one of them"):
        files("jobset", "v5e:4x4", claim="c")


WRONG = {
    "name": "Upper 1st -a a- a_b a.b " + "a" * 41,
    "image": "-x a$b a;b",
    "project": "My-project ab 1project a;b",
    "zone": "uswest us-west4 us-west4-a;x",
    "cluster": "C a_b -c",
    "namespace": "a.b A",
    "service_account": "A a/b",
    "claim": "A a/b",
    "bucket": "gs://texts A/b xy",
    "storage": "A",
    "mount": "data /a:b",
    "compile_cache": "cache ~/cache",
    "partition": "a;b $x --y",
    "account": "a|b",
    "time": "soon 1:2 4h",
    "address": "127.0.0.1:8265 http://x;y",
    "runtime_version": "-v a/b",
}


@pytest.mark.parametrize("field", WRONG)
def test_a_value_that_is_none_of_its_kind_is_named(field):
    for value in [*WRONG[field].split(), "", "a\nb", "x "]:
        with pytest.raises(ConfigError, match=rf"^--{field.replace('_', '-')} .* must be "):
            job("ray", "v5e:4x4", **{field: value})


def test_numbers_and_commands_are_checked():
    for more, message in [
        ({"command": " \n"}, "--command is empty"),
        ({"command": "a\0b"}, "control character"),
        ({"command": "a\x1b[2J"}, "control character"),
        ({"command": "a\r\nb"}, "control character"),
        ({"command": "a\x85b"}, "control character"),
        ({"command": "a\ud800"}, "control character"),
        ({"grace": 0}, "--grace 0 must be from 1"),
        ({"max_restarts": -1}, "--max-restarts -1 must be from 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            job("ray", "v5e:4x4", **more)
