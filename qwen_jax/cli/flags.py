"""Flags that several verbs share."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from qwen_jax.cli.console import print_table
from qwen_jax.cli.quantities import tokens_option
from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost, verbosity
from qwen_jax.distributed.verbosity import Level
from qwen_jax.files import reading
from qwen_jax.llm.options import AnswerOptions, ModelOptions, Options, did_you_mean

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A converted checkpoint, a Hugging Face directory, or a hub id that is downloaded.",
        show_default=False,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout.", rich_help_panel="Output")
]
MAY_BE_EMPTY = "may be empty"
"""Mark in a flag's `Annotated`: its text may be empty, which is refused otherwise."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reads:
    """Mark in the `Annotated` of a flag with several numbers: the function that parses it.

    Attributes:
        function: parser, which raises `ConfigError` naming the flag.
    """

    function: Callable[[str], object]


def option(text: str, *names: str, metavar: str | None = None) -> Any:
    """Declares a flag whose default is in its help text, if anywhere."""
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


System = Annotated[str | None, option("System text instead of the checkpoint's own."), MAY_BE_EMPTY]


Kv = Annotated[
    Path | None,
    option("A KV session made by `prefill`, which the prompt goes on after.", metavar="DIR"),
]


def not_one_of(flag: str, word: str, known: Iterable[str]) -> str:
    """Formats the error of an unknown word, with the known words and similar ones."""
    shown = reading.printable(word, 60)
    return f"{flag} '{shown}' is not one of {', '.join(known)}{did_you_mean(word, known)}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Flags(Options):
    """Options of the command line: notes go to stderr, and names are spelled as flags."""

    counts: ClassVar[bool] = True

    def spelled(self, name: str) -> str:
        return spelled(name)

    def counted(self, rows: Sequence[tuple[str, int]], total: int, limit: int) -> None:
        if rows and says():
            print_table(rows, total, limit)

    def say(self, text: str, level: Level = Level.SHORT) -> None:
        note(text, level)

    def watch(self, engine: Any) -> None:
        from qwen_jax.cli import profile

        profile.watch(engine)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags(_Flags, ModelOptions):
    """Flags of every verb that runs a model."""

    section: ClassVar[str] = "Model"
    others: ClassVar[dict[str, str]] = {
        "Attention": "dca dca_chunk dca_local dca_original sparse sparse_config least_recall "
        "dense_tail vllm_parity kernels",
        "Devices": "mesh",
    }
    helps: ClassVar[dict[str, Any]] = {
        "dtype": option("Precision of weights and cache; the checkpoint's own, on a CPU f32."),
        "slice": tokens_option(
            "Prompt tokens computed at a time; more is faster and takes memory."
        ),
        "dca": typer.Option(help="Dual Chunk Attention; auto follows config.json."),
        "dca_chunk": tokens_option("Largest relative position the model may see, in tokens."),
        "dca_local": tokens_option("Tokens around chunk borders seen at their true distance."),
        "dca_original": tokens_option("Training length of the attention temperature; 0 for none."),
        "sparse": typer.Option(
            help="Sparse prefill by the checkpoint's budgets; auto for prompts over its threshold."
        ),
        "sparse_config": option(
            "Budgets of sparse prefill instead of the checkpoint's own.", metavar="FILE"
        ),
        "least_recall": option(
            "Where a head would find less than this share of a slice's attention, it is dense."
        ),
        "dense_tail": tokens_option(
            "Tokens at a prompt's end that sparse prefill computes densely; vLLM has 0.", shown=True
        ),
        "max_len": tokens_option(
            "Longest prompt and answer together, as 128K (of 1,024) or 1M (1,048,576; "
            "Qwen2.5-1M models declare 1,010,000); what config.json declares."
        ),
        "vllm_parity": option(
            "Scale cached keys with the attention temperature, as vLLM does.", "--vllm-parity"
        ),
        "kernels": option(
            "Implementation of the attention kernels; the device's preferred one.",
            "--kernels",
            "--backend",
        ),
        "mesh": option(
            "How to use several devices, as seq=4,tensor=2; all accelerators, or one CPU.",
            metavar="AXIS=N,...",
        ),
        "no_compile_cache": option(
            "Keep no compiled programs and use none that were kept.", "--no-compile-cache"
        ),
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFlags(_Flags, AnswerOptions):
    """Flags of every verb that writes an answer."""

    section: ClassVar[str] = "Answer"
    helps: ClassVar[dict[str, Any]] = {
        "max_new_tokens": tokens_option("Longest answer, in tokens.", shown=True),
        "greedy": option("Always take the most likely token.", "--greedy"),
        "temperature": option("Above 1 is more varied, below 1 less, 0 is greedy."),
        "top_k": option("Choose among this many tokens; 0 for all."),
        "top_p": option("Choose among the likeliest tokens of this total probability."),
        "min_p": option("Choose among tokens this probable compared with the likeliest."),
        "repetition_penalty": option("Above 1 makes tokens that were seen less likely."),
        "seed": typer.Option(help="The same seed gives the same answer."),
        "stop": option("End the answer before this text; may be given repeatedly.", metavar="TEXT"),
    }


def spelled(name: str) -> str:
    """Returns the flag of an option, such as `--max-len`."""
    return "--" + {"files": "file"}.get(name, name).replace("_", "-")


def says(level: Level = Level.SHORT) -> bool:
    """Returns True if this process prints notes of a level; in a job only process 0 does."""
    return level <= verbosity.get() and multihost.is_first()


def note(text: str, level: Level = Level.SHORT) -> None:
    """Prints one line to stderr, after what stdout holds, if the verbosity includes its level."""
    if says(level):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, which is told at the end
            sys.stdout.flush()
        print(reading.shown(text), file=sys.stderr, flush=True)


def adding(verb: Callable, name: str, flags: type) -> Callable[[Callable], Callable]:
    """Decorates a function with the signature of a verb and one more dataclass of flags."""
    own = inspect.signature(verb).parameters.values()
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    more = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=flags)

    def wrap(function: Callable) -> Callable:
        functools.update_wrapper(function, verb)
        setattr(function, "__signature__", inspect.Signature([*parameters, more]))  # noqa: B010
        return function

    return wrap


def expand(verb: Callable) -> Callable:
    """Wraps a verb: parameters that are dataclasses become a flag for each of their fields.

    Typer derives flags from parameters; this lets verbs share flags without listing them.
    """
    parameters, shared, groups = [], [], {}
    for parameter in inspect.signature(verb).parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter)
            continue
        groups[parameter.name] = parameter.annotation
        shared.extend(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=_in_section(field, parameter.annotation),
            )
            for field in _flags_of(parameter.annotation)
        )

    @functools.wraps(verb)
    def expanded(**given):
        for name, group in groups.items():
            fields = [field.name for field in _flags_of(group)]
            given[name] = group(**{field: given.pop(field) for field in fields})
        return verb(**given)

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters + shared]
    setattr(expanded, "__signature__", inspect.Signature(parameters))  # noqa: B010
    expanded.__annotations__ = {each.name: each.annotation for each in parameters}
    return expanded


def _flags_of(flags: Any) -> list[dataclasses.Field]:
    """Returns the fields that are flags: those with a help text, if the class has a table."""
    helps = getattr(flags, "helps", None)
    return [each for each in dataclasses.fields(flags) if helps is None or each.name in helps]


def _in_section(field: dataclasses.Field, flags: Any) -> Any:
    """Returns the annotation of a flag, with its section of the help.

    The section is that of `others` of its class if it lists the flag, else `section`, if any.
    """
    section = getattr(flags, "section", None)
    for other, names in getattr(flags, "others", {}).items():
        section = other if field.name in names.split() else section
    hint: Any = field.type
    base, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    helps = getattr(flags, "helps", None)
    info = marks.pop(0) if helps is None else helps[field.name]
    placed = copy.copy(info)
    placed.rich_help_panel = info.rich_help_panel or section
    return Annotated[(base, placed, *marks)]


def refuse_text(flags: dict[str, object]) -> None:
    """Refuses flags that set the text of a session.

    Raises:
        ConfigError: naming the flag.
    """
    for name, value in flags.items():
        if value is not None:
            raise ConfigError(f"--kv contradicts {name}: the session holds its text already")
