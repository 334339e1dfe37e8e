"""`qwen-jax eval` on a tiny model: tables, JSON, comparisons that are continued, refusals."""

import json
import weakref

import pytest
from support import random_models, readers
from support.vocabularies import byte_level, save, small_vocabulary
from typer.testing import CliRunner

from qwen_jax.cli.eval import app
from qwen_jax.cli.quantities import whole_number
from qwen_jax.config import ConfigError
from qwen_jax.engine.request import Sparseness
from qwen_jax.llm.documents import DocumentError
from qwen_jax.llm.model import Model

DCA = ("--dca", "on", "--dca-chunk", 256, "--dca-local", 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = save(byte_level(*small_vocabulary()), tmp_path_factory.mktemp("model"))
    config = random_models.config(3, vocab_size=300)
    random_models.save(config, random_models.weights(config), directory)
    heads = {str(head): ["vertical_and_slash", 64, 128, 1.0] for head in range(config.num_heads)}
    budgets = [heads] * config.num_layers
    (directory / "sparse_attention_config.json").write_text(json.dumps(budgets))
    return directory


@pytest.fixture
def engines(monkeypatch):
    """Settings of each engine; with DCA engines repeat the prompt, else they answer nothing."""
    made = []
    alive = weakref.WeakSet()

    def engine(self, length, *, weights=None, **_):
        assert not alive  # never two caches
        found = readers.Reader(self.tokenizer(), lambda text: text)
        if self.sparse is not None and self.sparse.threshold == 0:
            found.sparse = Sparseness(density=0.25, recall=0.5, pairs=9, tokens=3)
        if self.config.dual_chunk is None:
            found.read = lambda text: "I do not know."
        alive.add(found)
        made.append((self.config.dual_chunk, self.sparse, weights, length))
        return found

    monkeypatch.setattr(Model, "engine", engine)
    return made


def run(family, *arguments):
    return CliRunner().invoke(app, [family, *map(str, arguments)], catch_exceptions=False)


def table(done):
    return [line.split() for line in done.stdout.splitlines()]


def test_a_table_of_lengths_and_depths_is_printed(model):
    done = run("passkey", model, "--lengths", "800,1K", "--depths", "0,1", "--slice", 256)
    assert done.exit_code == 0
    rows = table(done)
    assert rows[1] == ["tokens", "depth", "0", "depth", "1", "all"]
    assert [row[0] for row in rows[2:4]] == ["800", "1,024"]
    assert [row[-1] for row in rows[2:4]] == ["0/2", "0/2"]


def test_results_are_continued_and_reported_as_json(model, tmp_path, engines):
    out = tmp_path / "results.jsonl"
    flags = ("--depths", "0.5", "--out", out, "--json")
    run("passkey", model, "--lengths", "800", *flags)
    kept = out.read_bytes()
    done = run("passkey", model, "--lengths", "800,900", *flags)
    assert out.read_bytes().startswith(kept)
    assert len(out.read_bytes().splitlines()) == 3
    report = json.loads(done.stdout)
    assert report["task"] == "passkey"
    cell = {"task": "passkey", "depth": 0.5, "variant": None, "score": 0.0, "asked": 1}
    assert report["cells"] == [cell | {"length": length} for length in (800, 900)]
    assert "results.jsonl holds 1 of 2 answers" in done.stderr
    again = run("passkey", model, "--lengths", "800,900", *flags)
    assert again.stdout == done.stdout
    assert len(engines) == 2


def test_ways_to_run_are_compared_side_by_side(model, tmp_path, engines):
    out = tmp_path / "results.jsonl"
    flags = (model, *DCA, "--lengths", "700,900", "--out", out, "--samples", 2)
    done = run("niah", *flags, "--compare", "rope,dca,sparse")
    chunks, budgets, weights, lengths = zip(*engines, strict=True)
    assert [chunk and chunk.chunk_size for chunk in chunks] == [None, 256, 256]
    assert [sparse and sparse.threshold for sparse in budgets] == [None, None, 0]
    assert weights[0] is weights[1] is weights[2]
    assert lengths == 3 * (964,)
    assert table(done)[1:] == [
        ["tokens", "asked", "rope", "dca", "sparse"],
        ["700", "6", "0.0", "100.0", "100.0"],
        ["900", "6", "0.0", "100.0", "100.0"],
        "sparse: 25.0% of the attention computed, 50.0% of it found (means)".split(),
    ]
    records = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert [record["variant"] for record in records] == 12 * ["rope"] + 12 * ["dca"] + 12 * [
        "sparse"
    ]
    assert {"sparse" in record for record in records[24:]} == {True}


def test_a_comparison_that_was_torn_is_continued(model, tmp_path, engines):
    out = tmp_path / "results.jsonl"
    flags = (model, *DCA, "--lengths", "700", "--depths", "0.2,0.8", "--out", out, "--json")
    whole = run("niah", *flags, "--compare", "rope,dca,sparse").stdout
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    for cut in (1, 3, 6):
        out.write_bytes(b"".join(lines[:cut]) + lines[cut][:-9])
        del engines[:]
        done = run("niah", *flags, "--compare", "rope,dca,sparse")
        assert done.stdout == whole
        assert out.read_bytes().splitlines(keepends=True) == lines
        assert len(engines) == (8 - cut) // 2
    out.unlink()
    run("niah", *flags, "--compare", "dca")  # and columns may be added to a file
    assert run("niah", *flags, "--compare", "rope,dca,sparse").stdout == whole


def test_tasks_get_a_row_each_and_their_mean(model, engines):
    done = run(
        "ruler", model, *DCA, "--lengths", "3900", "--max-len", 9000, "--compare", "rope,dca"
    )
    rows = table(done)
    assert rows[1] == ["tokens", "task", "asked", "rope", "dca"]
    tasks = "niah_single niah_multikey niah_multivalue vt cwe".split()
    assert [row[1] for row in rows[2:7]] == tasks
    assert [row[2] for row in rows[2:7]] == ["3", "1", "1", "1", "1"]
    assert rows[7] == ["3,900", "mean", "of", "tasks", "0.0", "100.0"]
    alone = run("ruler", model, "--lengths", "1500", "--tasks", "niah_multivalue,vt")
    assert [row[1:] for row in table(alone)[2:4]] == [
        ["niah_multivalue", "1", "0.0"],
        ["vt", "1", "0.0"],
    ]


def test_a_sparse_prefill_is_measured(model):
    flags = ("--lengths", "700", "--depths", "0.5", "--slice", 256, "--dense-tail", 100, "--json")
    report = json.loads(run("niah", model, *DCA, *flags, "--compare", "sparse").stdout)
    [sparse] = report["cells"]
    assert 0 < sparse["density"] < 1
    assert 0 < sparse["recall"] < 1


def test_a_text_that_is_too_short_is_repeated_and_that_is_said(model, tmp_path, engines):
    book = tmp_path / "book.txt"
    book.write_text("It was late. The lamp was out.\n\nNobody came.\n")
    done = run("niah", model, "--lengths", "900", "--depths", "0.5", "--text", book)
    assert done.stderr.count("the 3 sentences of --text are too few: they are repeated") == 1
    out = tmp_path / "results.jsonl"
    run("niah", model, "--lengths", "900", "--text", book, "--out", out)
    with pytest.raises(ConfigError, match=r"text '[0-9a-f]+' -> None"):
        run("niah", model, "--lengths", "900", "--out", out)


@pytest.mark.parametrize(
    ("family", "flags", "named"),
    [
        ("passkey", "--lengths 0", "length '0'"),
        ("passkey", "--lengths 2x", "length '2x'"),
        ("passkey", "--lengths 1k,,2k", "--lengths '1k,,2k'"),
        ("passkey", "--depths deep", "--depths 'deep'"),
        ("niah", "--depths 2", "--depths 2.0 must be from 0 to 1"),
        ("niah", "--samples 0", "--samples 0 must be"),
        ("niah", "--lengths 99", "length=99 is too short: the question of niah alone takes"),
        ("ruler", "--tasks vt,qa", "--tasks 'qa' is not one of niah_single, "),
        ("ruler", "--tasks vt,vt", "each task may be given once"),
        ("ruler", "--lengths 2k", "too short: the question of cwe alone"),
        ("niah", "--compare rope,alibi", "--compare 'alibi' is not one of rope, dca, sparse"),
        ("niah", "--compare rope,rope", "--compare rope,rope names one twice"),
        ("niah", "--compare rope,dca", "has no Dual Chunk sizes; add --dca on"),
        ("niah", "--compare rope --dca off", "--dca off contradicts --compare"),
        ("niah", "--compare rope --sparse off", "--sparse off contradicts --compare"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused_by_name(
    model, tmp_path, engines, family, flags, named
):
    out = tmp_path / "results.jsonl"
    with pytest.raises(ConfigError, match=named):
        run(family, model, *flags.split(), "--out", out)
    assert not engines
    assert not out.exists()


def test_sparse_columns_need_budgets(model, tmp_path):
    for path in model.iterdir():
        if path.name != "sparse_attention_config.json":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ConfigError, match=r"--compare sparse: .* has no budgets"):
        run("niah", tmp_path, *DCA, "--compare", "sparse")


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"", "it is empty"), (b" \n", "it is empty"), (b"a\0b", "it is binary"), (b"\xe9", "UTF-8")],
)
def test_a_text_that_is_none_is_refused_by_name(model, tmp_path, content, named):
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=f"book.txt: .*{named}"):
        run("niah", model, "--text", path)
    with pytest.raises(DocumentError, match="nothing is missing"):
        run("ruler", model, "--text", path.with_name("nothing"))


def test_lengths_are_written_as_people_write_them():
    assert [whole_number(text) for text in ("12000", "12k", "12K", "1m", "1M")] == [
        12000,
        12000,
        12288,
        1000000,
        1048576,
    ]
