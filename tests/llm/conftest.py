"""A tiny model behind the front door; one for all tests, whose programs are compiled once."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from support.tiny_model import CONFIG, random_weights
from support.vocabularies import byte_level, save, small_vocabulary

from qwen_jax import LLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face directory of a random model with a tokenizer."""
    directory = tmp_path_factory.mktemp("front")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(random_weights(), directory / "model.safetensors", metadata={"format": "pt"})
    return save(byte_level(*small_vocabulary()), directory)


@pytest.fixture(scope="session")
def llm(checkpoint):
    with LLM(checkpoint, max_len=512, max_seqs=4) as opened:
        yield opened
