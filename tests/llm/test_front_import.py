"""Names that `import qwen_jax` gives, and modules that it leaves unimported."""

import os
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


def test_a_model_says_nothing_by_itself(checkpoint):
    """In a process whose environment says nothing of platforms, with libtpu and without a TPU."""
    names = "TPU_", "JAX_PLATFORMS", "ALLOW_MULTIPLE_LIBTPU_LOAD"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    program = (
        "import sys; from qwen_jax import LLM; "
        "LLM(sys.argv[1], max_len=32).generate([[1, 2]], max_new_tokens=2)"
    )
    command = [sys.executable, "-c", program, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, env=kept)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
