"""Numbers out of range are refused before a device or a file is touched, in every verb."""

import inspect
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main

from qwen_jax import cli

ZERO = set(
    "--dca-original --dense-tail --process-id --temperature --top-k --top-p --min-p --seed "
    "--margin --layer --head --logprobs --price-per-hour --max-restarts --depths".split()
)
"""Flags that may be 0."""
SEVERAL = {"--lengths", "--depths"}
"""Flags of several numbers, with commas between them."""


def commands() -> dict[str, Any]:
    root = typer.main.get_command(cli.application())
    found = {}
    for name in cli.VERBS:
        verb = root.get_command(typer.Context(root), name)
        own = getattr(verb, "commands", None)
        found |= {f"{name} {sub}": each for sub, each in own.items()} if own else {name: verb}
    return found


COMMANDS = commands()


def numbers(verb: Any) -> list[str]:
    """Flags of a verb whose type is a number, or that hold several."""
    found = []
    for param in verb.params:
        parameter = inspect.signature(verb.callback).parameters.get(param.name)
        hint = parameter and getattr(parameter.annotation, "__origin__", parameter.annotation)
        if {int, float} & {hint, *get_args(hint)} or param.opts[0] in SEVERAL:
            found.append(param.opts[0])
    return found


def required(verb: Any) -> list[str]:
    """Words for what a verb cannot do without, none of which is there."""
    words = []
    for param in verb.params:
        if param.required:
            choices = param.type_descriptor.choices
            word = str(next(iter(choices))) if choices else f"no-{param.name}"
            words += [param.opts[0], word] if param.param_type_name == "option" else [word]
    return words


def test_the_flags_that_count_are_found():
    found = {flag for verb in COMMANDS.values() for flag in numbers(verb)}
    assert found >= ZERO | SEVERAL
    assert found >= set("--tokens --max-seqs --repeats --samples --last --save-every".split())
    assert found >= set("--target-recall --memory --slice --grace --heartbeat".split())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_number_out_of_range_is_refused_before_anything_is_touched(
    name, tmp_path, monkeypatch, capsys
):
    def touched(*_, **__):
        raise AssertionError("a device was asked for")

    for function in ("devices", "local_devices", "default_backend", "device_count"):
        monkeypatch.setattr(f"jax.{function}", touched)
    monkeypatch.chdir(tmp_path)
    for flag in numbers(COMMANDS[name]):
        values = ["-1", *([] if flag in ZERO else ["0"]), "1" + 30 * "0", "nan", "inf"]
        if flag in SEVERAL:
            values += ["0.5,-1" if flag == "--depths" else "8,0"]
        for value in values:
            code = cli.main([*name.split(), *required(COMMANDS[name]), flag, value])
            out, err = capsys.readouterr()
            assert (code, out, err.count("\n")) == (2, "", 1), (flag, value, err)
            assert err.startswith(f"error: {flag}"), (flag, value, err)
    assert not list(Path().iterdir())
