"""Help that teaches, at once."""

import dataclasses
import subprocess
import sys

import pytest

from qwen_jax.cli import VERBS
from qwen_jax.cli.flags import ModelFlags

ANSWERING = ["generate", "ask", "chat", "batch", "score"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_begins_with_the_summary_of_the_verb(verb, run):
    code, out, err = run(*verb.split(), "--help")
    assert (code, err) == (0, "")
    assert VERBS[verb][2] in " ".join(out.split())
    assert "Raises" not in out


@pytest.mark.parametrize(
    "verb", [*ANSWERING, "calibrate", "doctor", "plan", "export-job", "bench kernels"]
)
def test_help_teaches_with_examples(verb, run):
    assert f"\n  Examples:\n      qwen-jax {verb}" in run(*verb.split(), "--help")[1]


def test_every_plot_teaches_with_an_example(run):
    for picture in ("eval", "recall", "plan"):
        code, out, err = run("plot", picture, "--help")
        assert (code, err) == (0, "")
        assert f"\n  Examples:\n      qwen-jax plot {picture} " in out


@pytest.mark.parametrize("verb", [*ANSWERING, "calibrate", "plot plan"])
def test_every_verb_that_runs_a_model_takes_the_same_flags(verb, run):
    words = run(*verb.split(), "--help")[1].replace(",", " ").split()
    for field in dataclasses.fields(ModelFlags):
        assert f"--{field.name.replace('_', '-')}" in words


@pytest.mark.parametrize(
    "verb", [*ANSWERING, "eval passkey", "bench", "bench prefill", "bench decode"]
)
def test_every_verb_that_answers_or_measures_can_be_profiled(verb, run):
    out = run(*verb.split(), "--help")[1]
    assert "--profile DIR" in out
    assert "--profile-steps FIRST:COUNT" in out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_every_verb_is_listed(arguments, run):
    code, out, _ = run(*arguments)
    assert code == 0
    for verb, (_, _, summary) in VERBS.items():
        assert f"  {verb}" in out
        assert summary in " ".join(out.split())


def test_the_version_is_told(run):
    assert run("--version")[1].startswith("qwen-jax ")


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from qwen_jax.cli import main; main(['--help']); main(['doctor', '--help']);"
        "main(['ask', '--help']); main(['plan', '--help']);"
        "main(['batch', '--help']); main(['export-job', '--help']); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_list_of_verbs_does_not_wait_for_numpy():
    code = (
        "import sys; from qwen_jax.cli import main; main(['--help']);"
        "print({'numpy', 'ml_dtypes', 'jax'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
