"""First contact with the commands: help, typos, ranges, notes."""

import os
import re
import subprocess
import sys

import pytest

from qwen_jax import cli
from qwen_jax.cli import evaluate, flags, on_hosts, profile
from qwen_jax.llm.model import open_model

DIGITS = "9" * 5000
UNDER = {"eval": ["passkey", "niah", "ruler"], "kv": ["inspect", "verify"]}
UNDER["plot"] = ["eval", "recall", "plan"]
ALL = [
    [],
    *([*verb.split()] for verb in cli.VERBS),
    *([word, verb] for word, verbs in UNDER.items() for verb in verbs),
]


def child(*arguments, **environment):
    """A command line in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_fits_any_terminal_and_cuts_no_word(words, run, monkeypatch):
    shown = []
    for columns in ("40", "80", "200", "0", "x"):
        monkeypatch.setenv("COLUMNS", columns)
        code, out, err = run(*words, "--help")
        assert (code, err) == (0, "")
        assert max(map(len, out.splitlines())) <= 100
        assert all(each.isprintable() for each in out.splitlines())
        shown.append(out.split())
    assert all(each == shown[0] for each in shown)
    assert "\\b" not in out
    assert not re.search(r"[a-z]\.\.\.", out)


@pytest.mark.parametrize("group", [flags.ModelFlags, flags.AnswerFlags])
def test_every_shared_flag_has_a_section_of_the_help(group, run):
    out = run("generate", "--help")[1]
    sections = {part.splitlines()[0]: part for part in out.split("\n\n")}
    listed = {
        name: other
        for other, names in getattr(group, "others", {}).items()
        for name in names.split()
    }
    assert set(listed) <= set(group.helps)
    for name in group.helps:
        section = listed.get(name, group.section)
        flag = f"--{name.replace('_', '-')}"
        assert flag in sections[f"{section}:"].replace(",", " ").split(), name


def test_sections_come_in_one_order(run):
    heads = [line for line in run("generate", "--help")[1].splitlines() if line.endswith(":")]
    heads = [line for line in heads if not line.startswith(" ")]
    names = ["Options", "Model", "Attention", "Answer", "Devices", "Hosts", "Profile", "Output"]
    assert heads == [f"{name}:" for name in ["Arguments", *names]]
    for group in (flags.ModelFlags, on_hosts.HostFlags, profile.ProfileFlags):
        assert group.section in names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["genrate"], "No such command 'genrate'; did you mean generate?"),
        (["eval", "passkye"], "No such command 'passkye'; did you mean passkey?"),
        (["bench", "prefil"], "No such command 'bench prefil'; did you mean bench prefill?"),
        (["generate", "M", "--promt", "x"], "No such option: --promt; did you mean --prompt?"),
        (
            ["ask", "M", "Q", "--dtype", "b16"],
            "--dtype 'b16' is not one of f32, bf16; did you mean",
        ),
        (["chat", "M", "--sparse", "of"], "did you mean off?"),
        (
            ["export-job", "slrum"],
            "KIND 'slrum' is not one of jobset, xpk, gcloud, ray, slurm; did",
        ),
        (["eval", "ruler", "MODEL", "--tasks", "vtt"], "did you mean vt?"),
        (["eval", "niah", "MODEL", "--compare", "dac"], "did you mean dca?"),
        (["bench", "decode", "--config", "7b"], "did you mean 7b-1m?"),
        (["bench", "ckpt"], "there is no such model"),
        (["bench", "my-model"], "there is no such model"),
        (["frobnicate"], "No such command 'frobnicate' (see qwen-jax --help)"),
        (["gen\x1b[2J\nx"], "No such command 'gen\\x1b[2J\\nx'"),
        (["generate", "M", "--\x1b[2J"], "No such option: --\\x1b[2J"),
        (["generate", "M", "--dtype", "\x1b[2J"], "--dtype '\\x1b[2J' is not one of"),
        (
            ["generate", "M", "--slice", "\x1b[2J"],
            "--slice '\\x1b[2J' is no number of tokens, such",
        ),
        (["generate", "M", "--seed", "\x1b[2J"], "--seed '\\x1b[2J' must be a whole number"),
        (["generate", "M", "--temperature", "warm"], "--temperature 'warm' must be a number"),
    ],
)
def test_a_typo_gets_a_line_that_says_what_was_meant(typed, meant, tiny, run):
    code, out, err = run(*[str(tiny) if word == "MODEL" else word for word in typed])
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert meant in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        # Ranges come before effects and contradictions, and before the model is looked at.
        ("--top-p 7 --greedy", "--top-p 7.0 must be from 0.0 to 1.0"),
        ("--min-p -1 --temperature 0", "--min-p -1.0 must be from 0.0 to 1.0"),
        ("--top-k -3", "--top-k -3 must be from 0 to 2147483647"),
        ("--temperature nan", "--temperature nan must be"),
        ("--temperature inf", "--temperature inf must be"),
        ("--temperature 1e999", "--temperature inf must be"),
        ("--repetition-penalty 0", "--repetition-penalty 0.0 must be from 0.0001"),
        ("--least-recall 0 --sparse off", "--least-recall 0.0 must be over 0 and at most 1"),
        ("--seed -1", "--seed -1 must be from 0 to 4294967295"),
        (f"--seed {DIGITS}", "… is too large a number"),
        (f"--temperature {DIGITS}", "--temperature inf must be"),
        ("--max-new-tokens 0", "--max-new-tokens 0 must be at least 1"),
        ("--heartbeat 99999999999", "--heartbeat 99999999999 must be under 2,147,483,648"),
        ("--num-processes 0", "--num-processes 0 must be at least 1"),
        ("--process-id -1", "--process-id -1 must be at least 0"),
        (["--stop", ""], "--stop must not be empty"),
        (["--prompt-file", ""], "--prompt-file must not be empty"),
        (["--kernels="], "--kernels must not be empty"),
        (["--coordinator", ""], "--coordinator must not be empty"),
        ("-q --verbose", "--quiet contradicts --verbose"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_number_out_of_range_or_an_empty_word_is_refused_first(given, said, run):
    given = given.split() if isinstance(given, str) else given
    code, out, err = run("generate", "nowhere", "--prompt", "x", *given)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert len(err) < 200


def test_an_empty_model_is_refused_and_an_empty_system_text_is_not(tiny, run):
    assert run("generate", "", "--prompt", "x")[2] == "error: MODEL must not be empty\n"
    code, _, err = run("ask", tiny, "Why?", "--system", "", "--max-new-tokens", 1, "--greedy")
    assert code == 0, err


def test_ranges_hold_for_flags_that_no_command_line_gave(tiny):
    with pytest.raises(flags.ConfigError, match="--slice 0 must be at least 1"):
        open_model(tiny, flags.ModelFlags(slice=0))
    with pytest.raises(flags.ConfigError, match="--max-len 2147483648 must be under"):
        open_model(tiny, flags.ModelFlags(max_len=2**31))


def test_notes_are_short_and_more_or_none_where_asked(tiny, run):
    words = ["generate", tiny, "--prompt", "The bee", "--greedy", "--slice", 16]
    words += ["--max-new-tokens", 2]
    code, answer, err = run(*words)
    assert code == 0
    first, last = err.splitlines()
    assert first == "cpu, 1 device; xla kernels; float32"
    assert last.startswith("7 prompt tokens, first token after ")
    code, out, err = run(*words, "-v")
    assert (code, out, err.count("\n")) == (0, answer, 4)
    assert "; slices " in err
    assert "sampling: greedy; " in err
    assert run("-q", *words) == (0, answer, "")


def test_a_quiet_command_says_errors_and_the_next_one_its_notes(tiny, run):
    long = ["generate", tiny, "--prompt", "x", "--max-len", 5000, "--kernels", "x"]
    for quiet, lines in (["-q"], 1), (["--quiet"], 1), ([], 2):
        code, out, err = run(*long, *quiet)
        assert (code, out, err.count("\n")) == (2, "", lines), err


def test_eval_shows_how_much_it_has_read(tiny, run, monkeypatch):
    class Recorder:
        def __init__(self, total):
            self.total, self.seen = total, []
            made.append(self)

        def update(self, done):
            self.seen.append(done)

        def close(self):
            self.seen.append("closed")

    made = []
    monkeypatch.setattr(evaluate, "Progress", Recorder)
    code, _, err = run(
        "eval", "passkey", tiny, "--lengths", "700,900", "--depths", "0,1", "--slice", 64
    )
    assert code == 0, err
    (progress,) = made
    *seen, last = progress.seen
    assert last == "closed"
    assert progress.total == seen[-1] == 2 * (700 + 900)
    assert seen == sorted(seen)
    assert len(set(seen)) > 40


def test_completion_knows_verbs_flags_and_values_without_jax():
    code = (
        "import sys\nfrom qwen_jax.cli import main\n"
        "try: main([])\nfinally: assert 'jax' not in sys.modules"
    )
    for words, found in {
        "ge": ["generate"],
        "b": ["batch", "bench"],
        "generate --top": ["--top-k", "--top-p"],
        "chat M --dtype ": ["f32", "bf16"],
        "kv ": ["inspect", "verify"],
        "generate --verb": ["--verbose"],
    }.items():
        done = child(
            "-c",
            code,
            _QWEN_JAX_COMPLETE="complete_bash",
            COMP_WORDS=f"qwen-jax {words}",
            COMP_CWORD=str(len(words.split(" "))),
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split() == found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown_and_installed(shell, tmp_path):
    told = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    shown = child("-m", "qwen_jax", "--show-completion", shell, **told)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "_QWEN_JAX_COMPLETE=complete_" in shown.stdout
    assert child("-m", "qwen_jax", "--install-completion", shell, **told).returncode == 0
    assert any(
        "_QWEN_JAX_COMPLETE" in path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    )


def test_the_package_runs_as_a_module():
    for arguments, expected in {("--version",): 0, (): 0, ("genrate",): 2}.items():
        done = child("-m", "qwen_jax", *arguments)
        assert done.returncode == expected
        assert done.stderr.count("\n") == (expected != 0)
        assert "__main__" not in done.stdout


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_ENABLE_X64", "maybe"),
        ("JAX_NUMPY_RANK_PROMOTION", "bogus"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "bogus"),
        ("JAX_DEFAULT_DEVICE", "bogus"),
    ],
)
@pytest.mark.parametrize("verb", [["doctor"], ["generate", "MODEL", "--prompt", "x"]])
def test_a_variable_that_jax_cannot_use_is_one_line(verb, name, value, tiny):
    words = [str(tiny) if word == "MODEL" else word for word in verb]
    done = child("-m", "qwen_jax", *words, **{name: value})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: jax cannot use a variable of the environment: ")
    assert value in done.stderr


@pytest.mark.parametrize("verb", [["bench", "kernels"], ["generate", "MODEL", "--prompt", "x"]])
def test_a_platform_that_is_not_here_is_named_in_one_line(verb, tiny):
    words = [str(tiny) if word == "MODEL" else word for word in verb]
    done = child("-m", "qwen_jax", *words, JAX_PLATFORMS="nowhere")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "nowhere" in done.stderr
