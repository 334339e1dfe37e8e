"""doctor --kernels: what it prints, what it writes, what it refuses."""

import dataclasses
import getpass
import json
import os
import pwd
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support.broken_kernels import break_, install

from pallas_kernels.check import Result
from pallas_kernels.programs import DENSE, PROGRAMS
from qwen_jax.cli import kernel_report, kernels
from qwen_jax.engine import first_contact
from qwen_jax.files import user_cache

FIGURES = {"context": 224, "truth": "reference", "limit": 1e-4}


@pytest.fixture(autouse=True)
def soon(monkeypatch, tmp_path):
    """Ceilings and times without work; results are kept elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(first_contact, "agreed_here", set())
    monkeypatch.setattr(kernels, "inputs", lambda what, case, dtype: jnp.zeros(1))
    monkeypatch.setattr(kernels, "seconds_of", lambda run, args, repeats: [0.5, 0.25, 1.0])


@pytest.fixture
def agreeing(monkeypatch):
    """Every program agrees, in no time."""

    def compare(shape, chosen, device):
        for program, who in chosen.items():
            lse = None if program == "selection" else 2e-7
            more = {"verdict": "agrees", "error": 1e-6, "lse_error": lse}
            yield Result(program=program, backend=who, **more, **FIGURES)

    monkeypatch.setattr(first_contact, "compare", compare)


def test_correctness_comes_first_then_ceilings_then_speed(agreeing, run, tmp_path):
    file = tmp_path / "report.json"
    code, out, err = run("doctor", "--kernels", "--report", file)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("cpu (cpu): 28 heads, 4 for keys, of 128 in float32; pages of 128;")
    places = [
        out.index(each)
        for each in ("log-sum-exp", "agrees", "float32 product", "copy, GB/s", "ms (median)")
    ]
    assert places == sorted(places)
    assert [line.split()[-1] for line in lines[2:6]] == ["agrees"] * 4
    found = json.loads(file.read_text())
    assert found["format"] == kernel_report.FORMAT
    assert [row["program"] for row in found["results"]] == list(PROGRAMS)
    assert found["versions"]["jax"] == jax.__version__
    assert found["device"] == {"platform": "cpu", "kind": jax.devices()[0].device_kind}
    assert found["shape"]["num_heads"] == 28
    assert found["ceilings"]["copy, GB/s"] == pytest.approx(2e-9 * (1 << 25) / 0.5)
    speeds = {row["program"]: row for row in found["speeds"]}
    assert speeds.keys() == PROGRAMS.keys()
    assert speeds["decode"]["rate"] == pytest.approx(1e-9 * 2 * 4 * 128 * 4 * 1024 / 0.5)
    assert speeds["prefill"]["share"] == pytest.approx(
        speeds["prefill"]["rate"] / found["ceilings"]["float32 product, TFLOP/s"]
    )
    assert found["doctor"]["versions"]["jax"] == jax.__version__
    assert "memory" in found["doctor"]


def test_a_report_names_no_place_of_this_machine(agreeing, run, tmp_path, monkeypatch, tiny):
    monkeypatch.setenv("HOME", str(tmp_path / "ann"))
    file = tmp_path / "report.json"
    code, _, _ = run("doctor", "--kernels", tiny, "--report", file)
    assert code == 0
    text = file.read_text()
    for secret in (str(tmp_path), tmp_path.name, os.getcwd(), str(tiny), Path(os.sys.executable)):
        assert str(secret) not in text
    assert "executable" not in json.loads(text)["doctor"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("cannot open /home/ann/models/7b/x.bin: no", "cannot open …/x.bin: no"),
        ('in "/opt/a b/c.py", line 3', 'in "…/a b/c.py", line 3'),
        ("~/secret/key and /srv", "…/key and …/srv"),
        ("cpu/gpu, 3/4, https://docs.jax.dev/en/at.html", None),
    ],
)
def test_of_paths_only_the_last_name_is_left(text, left):
    found = kernel_report.without_paths({"a": [text, 3, None], "executable": "x"})
    assert found == {"a": [left or text, 3, None]}


def test_paths_are_left_out_where_there_is_no_home(monkeypatch):
    def nobody(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert kernel_report.without_paths("open /home/me/x.bin") == "open …/x.bin"


def test_a_wrong_kernel_is_shown_not_timed_and_forgotten(run, monkeypatch, tmp_path):
    name = break_(monkeypatch, "decode", lambda run, *args, **more: (jnp.nan, jnp.nan))
    right = install(monkeypatch)

    def compare(shape, chosen, device):
        for program, who in chosen.items():
            wrong = who == name and program == "decode"
            said = {"verdict": "differs" if wrong else "agrees", "reason": "by 0.3" * wrong}
            yield Result(program=program, backend=who, error=0.3, lse_error=None, **said, **FIGURES)

    monkeypatch.setattr(first_contact, "compare", compare)
    code, out, _ = run("doctor", "--kernels", name, right, "--json")
    assert code == 1
    found = json.loads(out)
    assert {row["backend"] for row in found["speeds"]} == {right}
    assert [row["reason"] for row in found["results"] if row["verdict"] == "differs"] == ["by 0.3"]
    # Of the right one both kinds of engines know; of the wrong one none.
    contents = [path.read_text() for path in user_cache.directory("kernels").iterdir()]
    assert len(contents) == 2
    assert all(right in text and name not in text for text in contents)
    code, out, _ = run("doctor", "--kernels", name)
    assert code == 1
    assert f"decode by {name}, 224 tokens: by 0.3\n" in out


def test_what_the_doctor_found_right_an_engine_takes_as_known(agreeing, run, monkeypatch):
    name = install(monkeypatch)
    run("doctor", "--kernels", name)
    device = jax.local_devices()[0]
    shape, _ = kernel_report.shapes(device, None, None)
    for programs in (DENSE, tuple(PROGRAMS)):
        key = first_contact.key_of(shape, dict.fromkeys(programs, name), device)
        assert first_contact.known(key)
        other = first_contact.key_of(
            dataclasses.replace(shape, page=64), dict.fromkeys(programs, name), device
        )
        assert not first_contact.known(other)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "my notes", '{"format": "other"}', None])
def test_another_file_is_not_overwritten_and_nothing_is_measured(
    content, run, tmp_path, monkeypatch
):
    monkeypatch.delattr(first_contact, "compare")
    file = tmp_path / "mine.json"
    if content is None:
        os.mkfifo(file)
    else:
        file.write_text(content)
    code, out, err = run("doctor", "--kernels", "--report", file)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert f"{file} is " in err
    if content is None:
        assert "is a pipe: name a file" in err
        return
    assert "is there and no report of kernels: choose another name" in err
    assert file.read_text() == content
    code, _, err = run("doctor", "--kernels", "--report", file / "r.json")
    assert (code, err.count("\n")) == (2, 1)


def test_a_report_is_replaced_by_the_next_one(agreeing, run, tmp_path):
    file = tmp_path / "report.json"
    for _ in range(2):
        code, _, _ = run("doctor", "--kernels", "--report", file)
        assert code == 0
    assert [each.name for each in tmp_path.iterdir() if each.suffix == ".json"] == ["report.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--report", "r.json"], "--report has no effect without --kernels"),
        (["--config", "7b-1m"], "--config has no effect without --kernels"),
        (["xla"], "KERNELS has no effect without --kernels"),
        (["--kernels", "--config", "8b"], "--config '8b' is not one of 7b-1m"),
        (["--kernels", "nowhere"], "there is no such model"),
        (["--kernels", "a", "b"], "a and b are no kernels"),
        (["--kernels", "mosaic_tpu"], "backend 'mosaic_tpu' runs on tpu"),
    ],
)
def test_flags_that_cannot_be_used_end_in_one_line(arguments, said, run):
    code, out, err = run("doctor", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err


def test_ceilings_that_memory_does_not_allow_are_said_and_the_report_is_written(
    agreeing, run, monkeypatch, tmp_path
):
    monkeypatch.setattr(kernel_report, "COPIED_BYTES", ({"cpu": 1 << 50}, 1 << 30))
    file = tmp_path / "report.json"
    code, out, err = run("doctor", "--kernels", "--report", file)
    assert (code, err) == (0, "")
    assert "copy, GB/s: out of memory: end what else uses the device, or" in out
    found = json.loads(file.read_text())
    assert found["ceilings"]["copy, GB/s"] is None
    assert found["ceilings"]["float32 product, TFLOP/s"] > 0
    shares = {row["program"]: (row["rate"], row["share"]) for row in found["speeds"]}
    assert shares["decode"][0] > 0
    assert shares["decode"][1] is None
    assert shares["prefill"][1] > 0


@pytest.mark.long
def test_the_real_thing_on_a_cpu(run, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, out, _ = run("doctor", "--kernels", "--report", tmp_path / "r.json")
    assert code == 0
    assert out.count("agrees") == 8
    assert getpass.getuser() == "root" or getpass.getuser() not in (tmp_path / "r.json").read_text()
