"""A checkpoint so small that verbs run on it in seconds, and a way to run them."""

import shutil
from pathlib import Path

import jax
import pytest
from support import tiny_model
from support.fake_engine import FakeEngine

from qwen_jax.cli import main
from qwen_jax.llm.model import Model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A Hugging Face directory of a random model with a tokenizer."""
    return tiny_model.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def run(capsys):
    """Runs a command line; returns its exit code, stdout and stderr."""
    jax.devices()  # one for all tests, so that no `--mesh` makes more

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def fake(monkeypatch) -> FakeEngine:
    """The engine that every verb gets instead of a real one."""
    engine = FakeEngine()
    monkeypatch.setattr(Model, "engine", lambda self, length, **more: engine)
    return engine
