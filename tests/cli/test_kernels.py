"""bench kernels, and kernels that refuse a model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.broken_kernels import break_

from convert import weights
from pallas_kernels.cases import Served
from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.programs import PROGRAMS, inputs, program
from qwen_jax.cli import kernels
from qwen_jax.planner.shapes import SERVED

SMALL = Served(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    page=16,
    geometry=ChunkGeometry(chunk_size=64, local_size=16),
    slice_len=32,
    context=160,
    num_pages=11,
    num_columns=8,
    num_seqs=2,
)


@pytest.mark.parametrize(
    "names", [["xla"], pytest.param(["xla", "reference"], marks=pytest.mark.long)]
)
def test_bench_times_every_program_by_every_backend_that_runs_here(names, monkeypatch, run):
    monkeypatch.setitem(SERVED, "tiny", SMALL)
    flags = ["--shapes", "tiny", "--backends", ",".join(names), "--repeats", 2]
    code, out, _ = run("bench", "kernels", *flags, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["device"] == {"platform": "cpu", "kind": jax.devices()[0].device_kind}
    assert found["kernels"]["tpu v6e"]["decode"] == "mosaic_tpu"
    rows = found["rows"]
    assert [(row["program"], row["backend"]) for row in rows] == [
        (what, name) for what in PROGRAMS for name in names
    ]
    for row in rows:
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) <= row["median_s"] <= max(row["seconds"])


def test_shapes_that_memory_does_not_hold_are_a_line_with_the_way_out(monkeypatch, run):
    huge = dataclasses.replace(SMALL, num_pages=1 << 27, num_layers=1 << 14)
    monkeypatch.setitem(SERVED, "huge", huge)
    monkeypatch.setitem(SERVED, "tiny", SMALL)
    flags = ["--shapes", "huge,tiny", "--backends", "xla", "--repeats", 1]
    code, out, _ = run("bench", "kernels", *flags, "--json")
    assert code == 0
    rows = {(row["shape"], row["program"]): row["refused"] for row in json.loads(out)["rows"]}
    for (shape, _), refused in rows.items():
        if shape == "tiny":
            assert refused is None
        else:
            assert refused == (
                "out of memory: end what else uses the device, or take a smaller shape"
            )
    assert len(rows) == 2 * len(PROGRAMS)


def test_bench_shows_a_refusal_in_the_place_of_a_time(monkeypatch, run):
    def refuse(*args, **keywords):
        raise Unsupported("page=16 is odd")

    monkeypatch.setitem(SERVED, "tiny", SMALL)
    monkeypatch.setattr(kernels, "time_of", refuse)
    code, out, _ = run("bench", "kernels", "--shapes", "tiny")
    assert code == 0
    assert out.startswith("cpu (cpu); prefill xla, decode xla, select xla\n")
    assert "page=16 is odd" in out
    assert "mosaic_tpu" in out


def test_a_directory_called_kernels_is_still_a_model(run):
    code, _, err = run("bench", "./kernels")
    assert code == 2
    assert "no such model" in err


def test_the_programs_agree_between_backends():
    for what in PROGRAMS:
        args = jax.jit(lambda what=what: inputs(what, SMALL, jnp.float32))()
        ours, right = (jax.jit(program(what, SMALL, name))(*args) for name in ("xla", "reference"))
        for a, b in zip(ours, right, strict=True):
            a, b = map(np.asarray, (a, b))
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), what


def test_a_shape_that_a_kernel_refuses_ends_in_one_line(tiny, monkeypatch, run):
    """Refuses tiny pages and heads, as on a TPU."""
    monkeypatch.setitem(backend.RUNS_ON, "mosaic_tpu", ("tpu", "cpu"))
    code, _, err = run("generate", tiny, "--prompt", "x", "--backend", "mosaic_tpu")
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert " by mosaic_tpu: " in last
    assert last.endswith("(xla takes every shape)")
    assert "Traceback" not in err


def test_a_kernel_that_computes_other_numbers_refuses_before_the_weights_are_read(
    tiny, monkeypatch, run, tmp_path
):
    def wrong(right, *args, **options):
        out, lse = right(*args, **options)
        return out, lse + 1

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "load", None)
    name = break_(monkeypatch, "prefill", wrong)
    code, out, err = run("generate", tiny, "--prompt", "x", "--kernels", name)
    assert (code, out) == (2, "")
    comparing, last = err.splitlines()
    assert comparing == f"{name}: comparing with xla on {jax.devices()[0].device_kind}, once"
    assert last.startswith(f"error: prefill by {name} differs on ")
    assert "a log-sum-exp by 1 in" in last
    assert "choose other kernels (--kernels xla)" in last


def test_served_cases_have_room_for_their_context():
    for case in SERVED.values():
        assert case.context <= case.num_pages * case.page * max(case.num_seqs, 1)
        assert case.num_heads % case.num_kv_heads == 0
