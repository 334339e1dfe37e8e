"""A tokenizer for all tests of batches."""

import pytest
from support import batches

from qwen_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return batches.tokenizer(tmp_path_factory.mktemp("tokenizer"))
