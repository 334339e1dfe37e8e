"""bench prefill and bench decode: one long prompt, with weights and without."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from qwen_jax.cli import bench_long
from qwen_jax.cli.flags import ModelFlags
from qwen_jax.config import SparseConfig
from qwen_jax.llm.model import Model, open_model
from qwen_jax.models import params
from qwen_jax.models.configs import model_config


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.fixture
def budgets(tmp_path):
    """A file of budgets for the tiny model."""
    path = tmp_path / "budgets.json"
    head = ["vertical_and_slash", 40, 101, 1.0]
    path.write_text(json.dumps([{str(n): head for n in range(4)}] * 2))
    return path


@pytest.mark.parametrize("split", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_config_alone_is_enough_for_random_weights(split, model, run, budgets):
    for path in model.glob("*"):
        if path.name != "config.json":
            path.unlink()
    flags = ["--tokens", 700, "--slice", 128, "--repeats", 2, "--json"]
    flags += [] if split else ["--no-split"]
    sparse = ("--sparse", "on", "--sparse-config", budgets, "--dense-tail", 50)
    code, out, err = run("bench", "prefill", model, "--random-weights", *flags, *sparse)
    assert code == 0, err
    found = json.loads(out)
    assert found["weights"] == "random"
    assert found["prompt_tokens"] == 700
    assert found["decode_tokens_per_s"] is None
    assert 0 < found["density"] < 1
    assert 0 < found["recall"] < 1
    assert found["peak_bytes"] > 1 << 20
    assert [each["computed_tokens"] for each in found["runs"]] == [700, 700]
    assert found["prefill_tokens_per_s"] == pytest.approx(700 / found["ttft_s"])
    if split:
        assert list(found["split_s"]) == ["attention", "selection", "linear", "rest"]
        assert sum(found["split_s"].values()) == pytest.approx(found["ttft_s"])
    code, _, err = run("bench", "prefill", model, *flags)
    assert code == 2
    assert "model" in err.splitlines()[-1]


def test_decoding_is_timed_after_the_prompt(tiny, run):
    flags = ("--tokens", 300, "--new-tokens", 9, "--slice", 64, "--no-split")
    code, out, _ = run("bench", "decode", tiny, *flags, "--json")
    assert code == 0
    found = json.loads(out)
    (timings,) = found["runs"]
    assert timings["new_tokens"] == 9
    assert found["decode_tokens_per_s"] == timings["decode_tokens_per_s"] > 0
    assert (found["density"], found["recall"]) == (1, 1)
    assert "split_s" not in found
    code, out, _ = run("bench", "decode", tiny, *flags)
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["prompt", "weights", "first", "prefill", "decode", *2 * ["attention"], "peak"]


def test_a_run_that_compiled_is_not_counted(tiny, run, monkeypatch):
    monkeypatch.setattr(bench_long, "warm_up_tokens", lambda tokens, largest, opened: 20)
    code, out, err = run("bench", "prefill", tiny, "--tokens", 3000, "--no-split", "--json")
    assert code == 0
    assert err.count("this run compiled something and is not counted") == 1
    assert len(json.loads(out)["runs"]) == 1


def test_published_models_have_no_weights(run, monkeypatch):
    opened = []

    def measure(model: Model, *args, random, split):
        assert split
        opened.append((model.config, args, random))
        return dict.fromkeys(("prompt_tokens", "ttft_s", "prefill_tokens_per_s"), 1) | {
            "weights": "random",
            "decode_tokens_per_s": None,
            "density": 1.0,
            "recall": 1.0,
            "peak_bytes": 1,
            "split_s": {"attention": 0.75, "rest": 0.25},
        }

    monkeypatch.setattr(bench_long, "measure", measure)
    named = ("bench", "prefill", "--tokens", "1M", "--config")
    for name, layers in ("7b-1m", 28), ("14b-1m", 48):
        code, out, _ = run(*named, name, "--random-weights")
        assert code == 0
        assert re.search(r"^  attention +0\.75 s +$", out, re.MULTILINE)
        config, args, random = opened.pop()
        assert (config.num_layers, args, random) == (layers, (1 << 20, 1, 1), True)
    code, _, err = run(*named, "7b-1m")
    assert code == 2
    assert "--config 7b-1m has no weights here: add --random-weights" in err
    code, _, err = run(*named, "8b")
    assert code == 2
    assert "--config '8b' is not one of 7b-1m, 14b-1m" in err
    for both in ((), (".", "--config", "7b-1m")):
        code, _, err = run("bench", "decode", *both)
        assert code == 2
        assert "give MODEL, a directory or a name, or --config NAME, and not both" in err


@pytest.mark.parametrize(("sparse", "decode"), [(False, False), (True, False), (True, True)])
def test_parts_are_told_from_runs_that_leave_them_out(tiny, sparse, decode):
    """Time here is a sum over layers, so the parts are known."""
    config = dataclasses.replace(model_config(tiny), num_layers=5)
    weights = params.random(config, np.dtype("float32"))
    rows = ((40,) * config.num_heads,) * 5
    budgets = SparseConfig(vertical=rows, slash=rows, last_q=64) if sparse else None
    model = dataclasses.replace(open_model(tiny, ModelFlags()), config=config, sparse=budgets)
    attention, selection, linear, rest = 70.0, 8.0 if sparse and not decode else 0.0, 3.0, 2.0
    whole_layers = 0 if decode else 1  # of which the last reads one token

    def time(model, weights):
        layers = model.config.num_layers
        assert shapes(weights) == shapes(params.abstract(model.config, np.dtype("float32")))
        return (layers - whole_layers) * linear + rest + selection * (model.sparse is not None)

    found = bench_long.parts(
        *(time, model, weights, time(model, weights) + attention), sparse=sparse, decode=decode
    )
    assert sum(found.values()) == pytest.approx(time(model, weights) + attention)
    expected = {"attention": attention, "linear": (5 - whole_layers) * linear, "rest": rest}
    assert found == pytest.approx(expected | ({"selection": selection} if selection else {}))


def test_random_weights_are_a_tree_of_the_model(tiny):
    config = model_config(tiny)
    found = params.random(config, np.dtype("float32"))
    assert shapes(found) == shapes(params.abstract(config, np.dtype("float32")))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
