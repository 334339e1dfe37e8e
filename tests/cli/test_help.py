"""Help that teaches, at once."""

import importlib
import inspect
import subprocess
import sys

import pytest

from qwen_jax.cli import VERBS

OWN = ["generate", "ask", "chat", "score", "doctor"]


def test_the_summary_of_a_verb_is_its_own():
    for verb in OWN:
        module, name, summary = VERBS[verb]
        function = getattr(importlib.import_module(f"qwen_jax.cli.{module}"), name)
        assert inspect.getdoc(function).splitlines()[0] == summary


@pytest.mark.parametrize("verb", OWN)
def test_help_teaches_with_examples_and_names_each_flag(verb, run):
    code, out, err = run(verb, "--help")
    assert (code, err) == (0, "")
    assert f"\n  Examples:\n      qwen-jax {verb}" in out
    assert "Raises" not in out
    if verb != "doctor":
        for flag in ("--dtype", "--slice", "--dca-original", "--sparse", "--vllm-parity"):
            assert flag in out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_every_verb_is_listed(arguments, run):
    code, out, _ = run(*arguments)
    assert code == 0
    for verb, (_, _, summary) in VERBS.items():
        assert f"  {verb}" in out
        assert summary in out


def test_the_version_is_told(run):
    assert run("--version")[1].startswith("qwen-jax ")


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from qwen_jax.cli import main; main(['--help']); main(['doctor', '--help']);"
        "main(['ask', '--help']); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
