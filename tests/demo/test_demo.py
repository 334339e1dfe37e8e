"""The demo: a document long enough, one fact in it, and no success without the right answer."""

import dataclasses
import importlib.util

import demo_long
import demo_mesh
import jax
import pytest
from support import demo_checkpoint

from qwen_jax.engine.request import Sparseness
from qwen_jax.llm.answer import Answer, Timings
from qwen_jax.llm.model import Model
from qwen_jax.models.configs import model_config
from qwen_jax.text.tokenizer import Tokenizer

# By path: `demo` is also the name of this folder.
SPEC = importlib.util.spec_from_file_location(
    "demo_script", demo_checkpoint.ROOT / "scripts/demo.py"
)
demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(demo)
TEXT = demo.DOCUMENT.read_text(encoding="utf-8")


def test_the_fact_stands_in_one_place_of_the_document():
    assert TEXT.count("lamp room") == TEXT.count(demo.EXPECTED) == 2
    [entry] = [entry for entry in TEXT.split("\n\n") if demo.EXPECTED in entry]
    assert entry.count("lamp room") == 2


@pytest.mark.demo
def test_the_document_is_longer_than_the_model_was_trained_for_and_fits():
    directory = demo_checkpoint.directory()
    length = len(Tokenizer.load(directory).encode_text(TEXT))
    config = model_config(directory)
    assert length >= 10_000 > 8192
    assert config.dual_chunk is not None
    assert length > 2 * config.dual_chunk.chunk_size
    assert length + 200 < config.max_len


@pytest.mark.parametrize(
    ("chunked", "plain", "status"),
    [
        ("The key of the lamp room is number 71906.", "The key is a lamp.", 0),
        ("The key of the lamp room is number 71960.", "The key is a lamp.", 1),
        ("", "71906", 1),
    ],
)
def test_the_demo_succeeds_only_with_the_right_answer(
    tmp_path, monkeypatch, capsys, chunked, plain, status
):
    commands = []

    def answer(*arguments):
        commands.append(arguments)
        return plain if "off" in arguments else chunked if arguments[0] == "ask" else ""

    monkeypatch.setattr(demo, "qwen_jax", answer)
    monkeypatch.setattr(demo.demo_model, "fetch", lambda directory: None)
    monkeypatch.setattr("sys.argv", ["demo.py", str(tmp_path / "model")])
    assert demo.demo_model.demonstrate(demo.run, demo.__doc__) == status
    assert [command[0] for command in commands] == ["convert", "verify", "ask", "ask"]
    assert repr(chunked) in capsys.readouterr().out


def test_a_step_that_fails_ends_the_demo_with_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo.demo_model, "fetch", lambda directory: None)
    monkeypatch.setattr("sys.argv", ["demo.py", str(tmp_path / "missing")])
    assert demo.demo_model.demonstrate(demo.run, demo.__doc__) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: qwen-jax convert")


@pytest.mark.demo
@pytest.mark.parametrize(
    ("texts", "status"),
    [
        (["The pass key is {}"] * 4, 0),
        (["The pass key is {}"] * 3 + ["It is {}"], 1),
        (["The pass key is {}"] * 3 + ["The pass key is 1"], 1),
        (["The pass key is 1"] * 4, 1),
    ],
)
def test_the_demo_on_a_mesh_succeeds_only_with_four_equal_right_answers(
    texts, status, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["demo_mesh.py", str(demo_checkpoint.directory())])
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(Model, "weights", lambda self: None)
    monkeypatch.setattr(
        Model, "engine", lambda self, length, **_: (self.options.mesh, self.sparse is not None)
    )
    task = demo_long.KINDS["passkey"].build(
        demo_long.Material(Tokenizer.load(demo_checkpoint.directory())), demo_mesh.CELL
    )
    (number,) = task.expected
    ran = []

    def answer(engine, request, **_):
        assert len(request.prompt) == demo_mesh.CELL.length > 8192
        timings = Timings(
            prompt_tokens=0, computed_tokens=0, new_tokens=0, ttft_s=1.0, decode_s=1.0
        )
        done = Answer(
            token_ids=(),
            text=texts[len(ran)].format(number),
            finish_reason="stop",
            timings=timings,
        )
        ran.append(engine)
        return dataclasses.replace(done, sparse=Sparseness(density=0.5) if engine[1] else None)

    monkeypatch.setattr(demo_long, "answer", answer)
    assert demo_mesh.demo_model.demonstrate(demo_mesh.run, demo_mesh.__doc__) == status
    assert ran == [("seq=8", False), ("seq=8", True), ("seq=1", False), ("seq=1", True)]
    assert f"The pass key is {number}." in capsys.readouterr().out
