"""A tokenizer for all tests of batches."""

import batches
import pytest

from qwen_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return batches.tokenizer(tmp_path_factory.mktemp("tokenizer"))
