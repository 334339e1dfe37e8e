"""Numbers as people write them, in every flag that counts tokens or bytes."""

import importlib
import inspect

import pytest
import typer

from qwen_jax.cli import VERBS, quantities
from qwen_jax.config import ConfigError

TOKENS = {
    "12000": 12_000,
    "12k": 12_000,
    "12K": 12_288,
    "1m": 1_000_000,
    "1M": 1_048_576,
    " 128K ": 131_072,
    "0": 0,
    "-5": -5,
}
NONE = [
    "",
    "K",
    "1G",
    "1KB",
    "1.5K",
    "1 K",
    "1e3",
    "0x10",
    "1_000",
    "1,000",
    "٣",
    "1" * 5000,
    "\x1b",
]


def test_tokens_are_counted_in_thousands_and_in_powers_of_two():
    assert {text: quantities.tokens(text) for text in TOKENS} == TOKENS
    positive = {text: number for text, number in TOKENS.items() if number > 0}
    assert {text: quantities.whole_number(text) for text in positive} == positive


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(typer.BadParameter) as error:
        quantities.tokens(text)
    assert str(error.value).isprintable()
    with pytest.raises(ConfigError, match=r"^length .* must be tokens such as"):
        quantities.whole_number(text)


def test_bytes_have_units():
    sizes = {"40GiB": 40 << 30, "80GB": 80 * 10**9, "1.5TiB": 3 << 39, "512 MiB": 1 << 29}
    assert {text: quantities.size(text) for text in sizes} == sizes
    for text in ["", "40", "40G", "40gb", "-1GB", "0GiB", "1e3GB", "9" * 99 + "GB"]:
        with pytest.raises(typer.BadParameter, match="is no number of bytes, such as 40GiB"):
            quantities.size(text)


# Flags of whole numbers that count something else.
OTHERS = set(
    "grace head heartbeat init_timeout layer logprobs max_restarts max_seqs num_processes "
    "process_id repeats samples seed top_k".split()
)


def parameters():
    """Every flag of whole numbers, by verb."""
    for verb, (module, name, _) in VERBS.items():
        found = getattr(importlib.import_module(f"qwen_jax.cli.{module}"), name)
        inner = [found] if not isinstance(found, typer.Typer) else []
        if isinstance(found, typer.Typer):
            inner = [each.callback for each in found.registered_commands]
        for each in inner:
            for parameter in inspect.signature(each).parameters.values():
                arguments = getattr(parameter.annotation, "__args__", ())
                if arguments and arguments[0] in (int, int | None):
                    yield verb, parameter


def test_every_flag_that_counts_tokens_takes_k_and_m():
    found = list(parameters())
    assert len(found) > 50
    for verb, parameter in found:
        (info,) = [
            each for each in parameter.annotation.__metadata__ if hasattr(each, "param_decls")
        ]
        if info.parser not in (quantities.tokens, quantities.size):
            assert parameter.name in OTHERS, (verb, parameter.name)


@pytest.mark.parametrize("flag", ["--max-len", "--slice", "--max-new-tokens", "--dense-tail"])
def test_flags_read_them_and_check_their_range(flag, model, run):
    asked = "generate", model, "--prompt", "a", "--max-new-tokens", "1"
    code, _, err = run(*asked, flag, "1X")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{flag} '1X' is no number of tokens, such as 12000, 128K (of 1,024) or 1M" in err
    code, _, err = run(*asked, flag, "-1K")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{flag} -1024 must be at least" in err
