"""`qwen-jax eval passkey` on a tiny model: table, JSON, results that are continued, refusals."""

import json

import pytest
import random_models
from typer.testing import CliRunner
from vocabularies import byte_level, save, small_vocabulary

from qwen_jax.cli.eval import app, whole_number
from qwen_jax.config import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = save(byte_level(*small_vocabulary()), tmp_path_factory.mktemp("model"))
    config = random_models.config(3, vocab_size=300)
    random_models.save(config, random_models.weights(config), directory)
    return directory


def run(*arguments):
    return CliRunner().invoke(app, ["passkey", *map(str, arguments)], catch_exceptions=False)


def test_a_table_of_lengths_and_depths_is_printed(model):
    done = run(model, "--lengths", "800,1K", "--depths", "0,1", "--slice", 256)
    assert done.exit_code == 0
    table = done.stdout.splitlines()
    assert table[1].split() == ["tokens", "depth", "0", "depth", "1", "all"]
    assert [line.split()[0] for line in table[2:4]] == ["800", "1,024"]
    assert [line.split()[-1] for line in table[2:4]] == ["0/2", "0/2"]


def test_results_are_continued_and_reported_as_json(model, tmp_path):
    out = tmp_path / "results.jsonl"
    flags = ("--depths", "0.5", "--slice", 256, "--out", out, "--json")
    run(model, "--lengths", "800", *flags)
    kept = out.read_bytes()
    done = run(model, "--lengths", "800,900", *flags)
    assert out.read_bytes().startswith(kept)
    assert len(out.read_bytes().splitlines()) == 3
    report = json.loads(done.stdout)
    assert report["cells"] == [
        {"length": 800, "depth": 0.5, "right": 0, "asked": 1},
        {"length": 900, "depth": 0.5, "right": 0, "asked": 1},
    ]
    assert "results.jsonl holds 1 of 2 answers" in done.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--lengths", "0"), "length '0'"),
        (("--lengths", "2x"), "length '2x'"),
        (("--lengths", "1k,,2k"), "--lengths '1k,,2k'"),
        (("--depths", "deep"), "depth 'deep'"),
        (("--depths", "2"), "depth=2.0"),
        (("--samples", "0"), "samples=0"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused_by_name(model, flags, named):
    with pytest.raises(ConfigError, match=named):
        run(model, *flags)


def test_lengths_are_written_as_people_write_them():
    assert [whole_number(text) for text in ("12000", "12k", "12K", "1m", "1M")] == [
        12000,
        12000,
        12288,
        1000000,
        1048576,
    ]
