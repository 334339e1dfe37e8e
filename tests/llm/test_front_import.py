"""What `import qwen_jax` gives, and what it leaves unimported."""

import subprocess
import sys

import pytest

import qwen_jax

HEAVY = "jax numpy transformers tokenizers rich flax orbax typer".split()


def test_importing_the_package_imports_nothing_heavy():
    program = f"import sys, qwen_jax; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0)


def test_every_public_name_is_what_it_says():
    for name in qwen_jax.__all__:
        found = getattr(qwen_jax, name)
        assert name == "__version__" or found.__name__ == name
    assert set(qwen_jax.__all__) <= set(dir(qwen_jax))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'qwen_jax' has no attribute 'LLN'"):
        _ = qwen_jax.LLN
