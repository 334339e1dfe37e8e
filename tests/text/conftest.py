"""The same tests for a small vocabulary and for Qwen's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from support.vocabularies import (
    byte_level,
    cache_directory,
    qwen_vocabulary,
    save,
    small_vocabulary,
)

from qwen_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A directory with a tokenizer of 269 text tokens and Qwen's 22 added ones."""
    return save(byte_level(*small_vocabulary()), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Path:
    """A directory with Qwen's 151,643 text tokens and 22 added ones."""
    cache = cache_directory()
    name = "dashscope-2.0.2-py3-none-any.whl"
    if not (cache / name).exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "dashscope==2.0.2",
        ]
        done = subprocess.run(
            [*command, "--dest", str(cache)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            pytest.skip(f"Qwen's vocabulary needs `pip download dashscope` to work: {reason}")
    directory = tmp_path_factory.mktemp("qwen")
    return save(byte_level(*qwen_vocabulary(cache / name)), directory)


@pytest.fixture(scope="session", params=["small", "qwen"])
def directory(request) -> Path:
    """Each tokenizer directory in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tokenizer(directory) -> Tokenizer:
    """Tokenizer under test."""
    return Tokenizer.load(directory)


@pytest.fixture(scope="session")
def oracle(directory) -> tokenizers.Tokenizer:
    """The same files, read by the library itself."""
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
