"""The benchmark of GPU backends on a CPU: that it runs, what it writes, and what it refuses."""

import dataclasses
import itertools
import json

import bench_gpu
import bench_gpu_truth
import jax.numpy as jnp
import numpy as np
import pytest
from bench_gpu_inputs import REAL, TINY, Draw, served
from support import oracle, sparse_oracle

from pallas_kernels import plan
from pallas_kernels.cases import CASES
from pallas_kernels.dispatch import backend
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.prefill import xla

GEOMETRY = ChunkGeometry(chunk_size=12, local_size=5)


def run(tmp_path, *flags):
    """Exit status, and the rows that were written."""
    out = tmp_path / "rows.jsonl"
    status = bench_gpu.main(["--dry-run", "--seed", "7", "--out", str(out), *flags])
    return status, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.long
def test_a_dry_run_has_every_figure(tmp_path, capsys):
    status, rows = run(tmp_path, "--commit", "abc")
    assert status == 0
    assert len({(row["section"], row["figure"], row["who"]) for row in rows}) == len(rows)
    by_section = {
        section: {row["who"]: row for row in found}
        for section, found in itertools.groupby(rows, lambda row: row["section"])
    }
    assert list(by_section) == [*bench_gpu.SECTIONS, "targets"]
    for row in rows:
        assert row["seed"] == 7
        assert row["commit"] == "abc"
        assert row["device"] == "cpu"
        assert row["dry_run"]
        assert row["versions"]["jax"]
        assert row["date"]
        if row["who"] == "xla" and "over torch" not in row["figure"]:
            assert row["value"] > 0, row
            assert "reason" not in row
        if row["value"] is None:
            assert row.get("reason") or row["section"] == "targets", row
        if "seconds" in row:
            assert len(row["groups"]) == TINY.groups
            assert 0 < row["enqueued"] <= max(row["groups"])
    assert set(by_section["prefill"]) == {"xla", *bench_gpu.RIVALS}
    correct = [row for row in rows if row["section"] == "correct"]
    assert len(correct) == 8
    assert all(row["value"] <= 2e-2 for row in correct)
    said = capsys.readouterr().out
    assert "8 of 8 checks passed" in said
    assert "| decode: 200 tokens x 2 | GB/s |" in said
    assert "decode of 200 tokens x 2, over copy, xla:" in said


def test_a_backend_that_is_a_little_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    right, every = xla.prefill, bench_gpu.checks

    def wrong(*args, **keywords):
        out, lse = right(*args, **keywords)
        return out * jnp.asarray(1.001, out.dtype), lse

    monkeypatch.setattr(xla, "prefill", wrong)
    monkeypatch.setattr(bench_gpu, "checks", lambda *args: itertools.islice(every(*args), 1))
    status, rows = run(tmp_path, "--sections", "prefill")
    assert status == 1
    in_float32, in_bfloat16 = (row for row in rows if row["section"] == "correct")
    assert in_float32["value"] is None
    assert in_float32["reason"].startswith("WrongError: error 0.001,")
    assert in_bfloat16["value"] < 2e-2  # where a thousandth cannot be told from rounding
    (timed,) = (row for row in rows if row["section"] == "prefill" and row["who"] == "xla")
    assert timed["value"] is None
    assert "prefill was wrong" in timed["reason"]
    assert all(row["reached"] is None for row in rows if row["section"] == "targets")
    assert "not measured" in capsys.readouterr().out


def test_what_is_wrong_at_the_size_that_is_timed_is_not_timed_either(tmp_path, monkeypatch):
    right = xla.prefill

    def wrong(*args, **keywords):
        out, lse = right(*args, **keywords)
        return out.at[-1].set(jnp.nan), lse

    monkeypatch.setattr(xla, "prefill", wrong)
    monkeypatch.setattr(bench_gpu, "TINY", dataclasses.replace(TINY, checks=()))
    monkeypatch.setattr(bench_gpu, "RIVALS", {})
    status, rows = run(tmp_path, "--sections", "prefill,dca")
    assert status == 1
    reasons = [row["reason"] for row in rows if row["section"] in ("prefill", "dca")]
    assert reasons[0].startswith("WrongError: error nan")
    assert all("prefill was wrong" in each for each in reasons[1:3])
    assert reasons[3] == "LookupError: in one window was not timed"


@pytest.mark.parametrize("error", [RuntimeError, backend.Unsupported])
def test_a_backend_that_passes_no_check_is_no_success(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error("no such kernel")

    monkeypatch.setattr(xla, "prefill", fail)
    every = bench_gpu.checks
    monkeypatch.setattr(bench_gpu, "checks", lambda *args: itertools.islice(every(*args), 1))
    status, rows = run(tmp_path, "--sections", "correct")
    assert status == 1
    reasons = {row["reason"] for row in rows if row["section"] == "correct"}
    assert len(reasons) == 1
    assert reasons.pop().startswith(f"{error.__name__}: ")


def test_it_needs_a_gpu_and_known_names(capsys):
    for flags in ([], ["--dry-run", "--sections", "x"], ["--dry-run", "--backends", "triton"]):
        with pytest.raises(SystemExit):
            bench_gpu.main(flags)
    said = capsys.readouterr().err
    assert "no GPU here but a cpu" in said
    assert "x: there are correct, ceilings" in said
    assert "triton: there are xla" in said


def test_the_host_is_named_where_it_was_timed():
    row = {"value": 2.0, "seconds": 1.0, "enqueued": 0.95, "calls": 2}
    assert bench_gpu.cell(row) == "2 (host)"
    assert bench_gpu.cell(row | {"enqueued": 0.1}) == "2"
    assert bench_gpu.cell(row | {"calls": 1}) == "2"
    assert bench_gpu.cell({"value": None, "reason": "x"}) == "-"


def case(geometry, *, context=40, slice_len=8):
    return served(
        CASES["tiles fit the chunk"],
        context=context,
        page=8,
        num_seqs=1,
        geometry=geometry,
        slice_len=slice_len,
        num_layers=2,
        num_columns=5,
    )


@pytest.mark.parametrize("geometry", [None, GEOMETRY])
def test_the_truth_is_that_of_the_oracles(geometry):
    draw, shape = Draw(0), case(geometry, context=37)
    (args,) = draw.slices(shape, "float32", sets=1, padding=2)
    q, kv, layer, table, start, length = args
    start, length = int(start), int(length)
    end = start + length
    flat = [
        np.asarray(x[layer, :, table]).swapaxes(1, 2).reshape(-1, 2, 16)
        for x in (kv.keys, kv.values)
    ]
    assert np.isnan(flat[0][end:]).all()
    assert not np.isnan(flat[0][:end]).any()
    listed = draw.plan(shape, start, length, TINY.tiles, 0.3)
    for given in (None, listed):
        mask = given and np.asarray(plan.to_mask(given, args[4], args[5], num_keys=40))
        expected = oracle.attention(q, *flat, start, length, geometry, mask)
        errors = bench_gpu_truth.check_slice(
            draw.rng, shape, args, expected_as(expected), 99, given
        )
        assert max(errors.values()) < 1e-6
    votes = sparse_oracle.votes(q, flat[0], start, length, geometry)
    padded = [np.pad(x, ((0, 0), (0, 3))).astype(np.float32) for x in votes]
    voting = (q, kv, layer, table, jnp.int32(start), jnp.int32(length))
    assert bench_gpu_truth.check_votes(shape, voting, padded, range(4))["error"] < 1e-6
    padded[1][3, 20] += 1e-3
    with pytest.raises(bench_gpu_truth.WrongError):
        bench_gpu_truth.check_votes(shape, voting, padded, range(4))


def expected_as(found):
    return [x.astype(np.float32) for x in found]


def test_a_random_plan_has_the_density_it_was_asked_for():
    shape = dataclasses.replace(case(None, context=512, slice_len=512), num_columns=0)
    tiles = dataclasses.replace(TINY.tiles, q=32, k=16)
    listed = Draw(0).plan(shape, 0, 512, tiles, 0.25)
    kept = np.asarray(listed.reads()).sum(-1)
    # A tile has two blocks more than the one before it, and reads its own two at least.
    wanted = [max(round(0.25 * 2 * (i + 1)), 2) for i in range(16)]
    np.testing.assert_array_equal(kept, [wanted] * 4)
    density = plan.density(listed, jnp.int32(0), jnp.int32(512))
    np.testing.assert_allclose(density, sum(wanted) / (16 * 17), rtol=1e-6)


def test_sizes_are_those_of_the_issue():
    assert REAL.prompts == (8192, 16384, 32768, 131072)
    shape = REAL.case(REAL.context, REAL.slice_len, chunks=True)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (28, 4, 128)
    assert shape.context == 1_010_000
    largest = max(
        REAL.case(context, 1, chunks=True, layers=layers, seqs=seqs).cache_bytes
        for context, seqs, layers in REAL.decode
    )
    assert largest < 40e9
    assert set(backend.on("gpu")) >= {"triton", "xla"}
