"""A tiny model behind the front door; one for all tests, whose programs are compiled once."""

from pathlib import Path

import pytest
from support import tiny_model

from qwen_jax import LLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face directory of a random model with a tokenizer."""
    return tiny_model.write(tmp_path_factory.mktemp("front"))


@pytest.fixture(scope="session")
def llm(checkpoint):
    with LLM(checkpoint, max_len=512, max_seqs=4) as opened:
        yield opened
