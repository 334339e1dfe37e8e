"""Output of plan on topologies, from a config.json alone."""

import json
import re
from collections import Counter

import pytest

from qwen_jax.models import presets
from qwen_jax.planner.aot import Program
from qwen_jax.planner.hlo import Collective

pytestmark = pytest.mark.optimized

TOPOLOGIES = {
    # name: (devices, does the 7B model fit with 1,010,000 tokens, does the 14B)
    "v5e:2x2": (4, False, False),
    "v5e:2x4": (8, True, False),
    "v5e:4x4": (16, True, False),
    "v5e:8x8": (64, True, True),
    "v6e:2x2": (4, True, False),
    "v6e:2x4": (8, True, True),
    "v6e:4x4": (16, True, True),
    "v5p:2x2x1": (4, True, True),
    "v5p:2x2x2": (8, True, True),
    "tpu7x:2x2x1": (8, True, True),
    "v4:2x2x2": (8, True, True),
    "h100:8": (8, True, True),
    "h200:1": (1, True, False),
    "h200:8": (8, True, True),
}


def examine(run, directory, *arguments):
    code, out, err = run("plan", directory, *arguments, "--json")
    found = json.loads(out)
    assert code == (0 if found["fits"] else 1)
    return found, err


@pytest.mark.parametrize("model", ["7b", "14b"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_topology_is_answered(topology, model, tmp_path, run):
    devices, *fits = TOPOLOGIES[topology]
    found, err = examine(run, presets.write(tmp_path, model), "--topology", topology)
    assert err == ""
    assert found["tokens"] == 1_010_000
    assert found["devices"] == devices == found["mesh"]["seq"] * found["mesh"]["tensor"]
    assert found["fits"] == fits[model == "14b"] == (found["longest"] >= 1_010_000)
    sizes = found["bytes"]
    assert sizes.pop("total") == sum(sizes.values())
    assert found["headroom"] == found["device"]["memory"] - sum(sizes.values())
    assert bool(found["advice"]) != found["fits"]


def follow(advice, arguments):
    """A command line changed as a piece of advice says."""
    if more := re.fullmatch(r"--topology (v5e:\d+x\d+): \d+ devices as seq=\d+,tensor=4", advice):
        kept = [each for each in arguments if not each.startswith(("--mesh", "seq="))]
        return ["--topology", more[1], *kept]
    if advice.startswith("leave out --mesh: "):
        return ["--topology", "v5e:2x4", *arguments[:-2]]
    flag, value = re.match(r"(--\w+) (\w+)", advice).groups()
    return ["--topology", "v5e:2x4", *arguments, flag, value]


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        ("--tokens 1010000 --mesh seq=8", "leave --tokens --topology"),
        ("--tokens 1010000 --dtype f32", "--dtype --tokens --topology"),
        ("--tokens 1010000 --slice 262144", "--slice --tokens --topology"),
        ("--tokens 4000000", "--tokens --topology"),
        ("--tokens 4000000 --dtype f32 --mesh seq=2,tensor=4", "--tokens --topology"),
        ("--tokens 4000000 --mesh seq=8", "--tokens --topology"),
    ],
)
def test_every_piece_of_advice_makes_it_fit(arguments, kinds, tmp_path, run):
    model, arguments = presets.write(tmp_path, "7b"), arguments.split()
    found, _ = examine(run, model, "--topology", "v5e:2x4", *arguments)
    assert not found["fits"]
    assert " ".join(advice.split()[0] for advice in found["advice"]) == kinds
    for advice in found["advice"]:
        assert examine(run, model, *follow(advice, arguments))[0]["fits"], advice


def test_the_longest_context_is_what_memory_holds_or_the_model_declares(tmp_path, run):
    model = presets.write(tmp_path, "7b")
    found, _ = examine(run, model, "--topology", "v5e-64")
    assert found["longest"] == found["declared"] == 1_010_000 < found["longest_in_memory"]
    found, _ = examine(run, model, "--topology", "v5e-8", "--dtype", "f32")
    assert found["longest"] == found["longest_in_memory"] < found["declared"]
    _, out, _ = run("plan", model, "--topology", "v5e-8", "--dtype", "f32")
    assert f"does not fit; the longest context that fits is {found['longest']:,} tokens" in out


def test_a_published_model_needs_no_directory(tmp_path, run):
    asked = "--topology", "v5e:4x4", "--json"
    named, _ = examine(run, "--config", "14b-1m", *asked)
    there, _ = examine(run, presets.write(tmp_path, "14b"), *asked)
    assert named | {"model": ""} == there | {"model": ""}
    assert named["model"] == "14b-1m"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give MODEL, a directory or a name, or --config NAME, and not both"),
        (". --config 7b-1m", "give MODEL, a directory or a name, or --config NAME, and not both"),
        ("--config 7b", "--config '7b' is not one of 7b-1m, 14b-1m"),
        (
            "--config 7b-1m --tokens 1G",
            "--tokens '1G' is no number of tokens, such as 12000, 128K (of 1,024)",
        ),
        ("--config 7b-1m --tokens 0K", "--tokens 0 must be at least 1"),
        (
            "--config 7b-1m --memory 40",
            "--memory '40' is no number of bytes, such as 40GiB",
        ),
        ("--config 7b-1m --memory 0GB", "--memory '0GB' is no number of bytes"),
        ("--config 7b-1m --topology gpu:2", "give the memory of each device, as --memory 40GiB"),
    ],
)
def test_a_mistake_gets_one_line(arguments, message, run):
    where = [] if "--topology" in arguments else ["--topology", "h200"]
    code, out, err = run("plan", *arguments.split(), *where)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_memory_can_be_said_of_any_device(tmp_path, run):
    model = presets.write(tmp_path, "7b")
    asked = "--tokens", "128K", "--topology"
    other, _ = examine(run, model, *asked, "gpu:8", "--memory", "40GiB")
    known, _ = examine(run, model, *asked, "a100-80:8", "--memory", "40GiB")
    assert other["tokens"] == 131_072
    assert other["device"]["memory"] == known["device"]["memory"] == 40 << 30
    assert other["bytes"] == known["bytes"]
    assert (other["least_prefill_seconds"], known["least_prefill_seconds"] > 0) == (None, True)
    less, _ = examine(run, model, *asked, "gpu", "--memory", "16GB")
    assert (less["fits"], less["device"]["memory"]) == (False, 16 * 10**9)
    assert any(each.startswith("--topology gpu:") for each in less["advice"])


def test_the_longest_context_fits_when_it_is_asked_for(tmp_path, run):
    """Though it is read in larger slices than the short one that was asked for."""
    model = presets.write(tmp_path, "7b")
    where = "--topology", "v6e:2x2", "--tokens"
    found, _ = examine(run, model, *where, "1000")
    longest, _ = examine(run, model, *where, str(found["longest"]))
    assert longest["slice"] > found["slice"]
    assert longest["fits"]
    assert longest["longest"] == found["longest"]


def test_bounds_on_time_come_from_published_rates(tmp_path, run):
    model = presets.write(tmp_path, "7b")
    asked = ["--topology", "v5e:4x4"]
    found, _ = examine(run, model, *asked)
    assert found["least_prefill_seconds"] == found["prefill_flops"] / (16 * 197e12)
    halves, _ = examine(run, model, *asked, "--mesh", "data=2,seq=2,tensor=4")
    assert halves["least_prefill_seconds"] == 2 * found["least_prefill_seconds"]
    # All weights but the embedding, which a token reads a row of, and the cache.
    embedding = 2 * 152_064 * 3584 // 4
    read = found["bytes"]["weights"] - embedding + found["bytes"]["cache"]
    assert found["least_decode_seconds"] == read / 819e9


def test_the_text_names_mesh_bytes_headroom_and_the_longest_context(tmp_path, run):
    model = presets.write(tmp_path, "7b")
    code, out, err = run("plan", model, "--topology", "v5e:4x4", "--tokens", "1010000")
    assert (code, err) == (0, "")
    for text in (
        "7,615,616,512 parameters, bfloat16, 57,344 bytes of cache a token",
        "16 of 15.75 GiB",
        "seq=4,tensor=4: the largest tensor that divides 16 devices, 28 and 4 heads",
        "weights      3.55 GiB",
        "headroom",
        "fits; the longest context is the 1,010,000 tokens that config.json declares (memory would "
        "hold 3,",
    ):
        assert text in out


def test_a_context_beyond_what_the_model_declares_is_noted(tmp_path, run):
    model = presets.write(tmp_path, "7b")
    _, err = examine(run, model, "--topology", "v6e:16x16", "--tokens", "10000000")
    assert err == "10,000,000 tokens are over the 1,010,000 that config.json declares\n"


def test_budgets_of_sparse_prefill_take_workspace(model, run):
    asked = ["--topology", "v5e:1x1", "--tokens", "100000", "--slice", "1024"]
    dense, _ = examine(run, model, *asked)
    row = {str(head): ["vertical_and_slash", 8, 8, 1.0] for head in range(4)}
    (model / "sparse_attention_config.json").write_text(json.dumps([row, row]))
    sparse, _ = examine(run, model, *asked)
    assert (dense["sparse"], sparse["sparse"]) == (False, True)
    assert sparse["bytes"]["workspace"] > dense["bytes"]["workspace"] + 4 * 4 * 100_000


def test_virtual_devices_share_the_memory_of_the_machine(model, run, monkeypatch):
    monkeypatch.setattr("qwen_jax.planner.devices.host_bytes", lambda: 8 << 30)
    found, _ = examine(run, model, "--topology", "cpu:8")
    assert found["device"]["memory"] == 1 << 30
    assert found["dtype"] == "float32"
    assert found["mesh"] == {"data": 1, "seq": 4, "tensor": 2}
    assert found["least_prefill_seconds"] is None


@pytest.mark.usefixtures("unchecked")
def test_programs_are_compiled_for_tpus_that_are_not_there(model, run):
    pytest.importorskip("libtpu", reason="the TPU compiler (pip install libtpu) is not installed")
    asked = ["--topology", "v5e:2x2", "--mesh", "seq=4", "--tokens", "1000", "--slice", "128"]
    found, err = examine(run, model, *asked, "--compile")
    assert err == "compiled prefill\ncompiled decode\n"
    assert found["fits"]
    prefill, decode = found["programs"]
    for program in prefill, decode:
        assert 0 < program["arguments"] < program["peak"] < 1 << 24
        assert program["sent"] == sum(
            each["sent"] * each["count"] for each in program["collectives"]
        )
    # The first of two layers sends what was found for a quarter of 128 queries, 4 heads of 8.
    dealt = [each for each in prefill["collectives"] if each["kind"] == "all-to-all"]
    assert {(each["axes"], each["put"], each["count"]) for each in dealt} == {
        ("seq", 4 * 128 * 4 * 8, 1),
        ("seq", 4 * 128 * 4, 1),
    }


def test_the_text_names_what_the_compiler_made_or_why_it_refused(tmp_path, run, monkeypatch):
    gathered = Collective("all-gather", "seq", "bf16[8,128]", 1 << 21, 3 << 20)
    made = [
        Program(
            name="prefill",
            arguments=7 << 30,
            temporaries=1 << 30,
            peak=8 << 30,
            collectives=Counter({gathered: 27}),
        ),
        Program(name="decode", peak=17 << 30, refusal="Used 17.00G of 15.75G hbm."),
    ]
    monkeypatch.setattr("qwen_jax.planner.aot.programs", lambda *_: iter(made))
    asked = "plan", presets.write(tmp_path, "7b"), "--topology", "v5e:4x4", "--compile"
    code, out, _ = run(*asked)
    assert code == 1
    for text in (
        "verdict   does not fit",
        "compiled  at most 17.00 GiB at once; what is planned is 48.",
        "prefill: 7.00 GiB of arguments, 1.00 GiB beside them, 8.00 GiB at once; "
        "a device sends 81.00 MiB a step",
        "27 x  all-gather  seq  bf16[8,128]  3.00 MiB",
        "decode, refused by the compiler: Used 17.00G of 15.75G hbm.",
    ):
        assert text in out


@pytest.mark.parametrize("topology", ["h200:8", "cpu:8"])
def test_only_tpus_can_be_compiled_for_without_one(topology, model, run):
    code, out, err = run("plan", model, "--topology", topology, "--compile")
    assert (code, out) == (2, "")
    reason = "programs can be compiled without devices for TPUs only: leave out --compile"
    assert err == f"error: {topology}: {reason}\n"


def test_topologies_that_the_compiler_does_not_know_are_named(model, run):
    pytest.importorskip("libtpu", reason="the TPU compiler (pip install libtpu) is not installed")
    code, out, err = run("plan", model, "--topology", "v4:2x2x1", "--compile")
    assert (code, out) == (2, "")
    assert err.startswith("error: v4:2x2x1: the TPU compiler ")
    assert err.count("\n") == 1
