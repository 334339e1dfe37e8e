"""Typer commands with help sections, number ranges, and the flags `-v` and `-q`."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
import typer.core
import typer.main
from typer._click.shell_completion import CompletionItem

from qwen_jax.cli import flags
from qwen_jax.config import ConfigError
from qwen_jax.distributed import verbosity
from qwen_jax.distributed.verbosity import Level
from qwen_jax.files import reading
from qwen_jax.llm.options import check_number

# Typer keeps a Click of its own; these are the bases of its complaints and of its help.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_HelpFormatter: Any = typer.Context.formatter_class

PLAIN: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
_SECTIONS = ("Options", "Model", "Attention", "Answer", "Devices", "Hosts", "Profile", "Output")
_NARROW = 60  # columns under which descriptions go below the flags
_NAMES = 28  # columns of flags, where descriptions go beside them
_SHOWN = 60  # characters of a value in an error


class App(typer.Typer):
    """Group of verbs under one word, such as those of `eval`."""

    def __init__(self, summary: str):
        super().__init__(
            cls=Group, help=summary, no_args_is_help=True, add_completion=False, **PLAIN
        )
        self.callback()(lambda: None)  # or a single verb would stand for the word

    def verb(self, name: str, more: str = "") -> Callable[[Callable], Callable]:
        """Registers a verb, whose docstring is its help.

        Args:
            more: paragraphs before the examples.
        """

        def register(verb: Callable) -> Callable:
            self.command(name, cls=Command, help=teach(verb, more))(verb)
            return verb

        return register


def command(name: str, verb: Callable) -> Any:
    """Builds the command of a verb."""
    app = typer.Typer(add_completion=False, **PLAIN)
    app.command(cls=Command, help=teach(verb))(verb)
    made = typer.main.get_command(app)
    made.name = name
    return made


def teach(verb: Callable, more: str = "") -> str:
    """Builds help from a docstring, without Args, Raises and Returns; `more` precedes examples."""
    text = re.split(r"\n\n(?:Args|Raises|Returns):\n", inspect.getdoc(verb) or "")[0]
    head, examples, tail = text.partition("\n\nExamples:\n")
    return "\n\n".join(filter(None, (head, more.strip()))) + examples + tail


class _Formatter(_HelpFormatter):
    """Formats help to 40 to 80 columns without breaking words; keeps indented paragraphs."""

    def __init__(self, **_):
        super().__init__(width=min(max(shutil.get_terminal_size().columns, 40), 80) - 2)
        self.names = 0

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        self.write(self._filled(f"Usage: {prog} {args}", "", "    "))

    def write_text(self, text: str) -> None:
        indent = " " * self.current_indent
        for number, paragraph in enumerate(text.split("\n\n")):
            self.write("\n" if number else "")
            if re.search(r"(?m)^ ", paragraph):
                self.write(textwrap.indent(paragraph, indent) + "\n")
            else:
                self.write(self._filled(paragraph, indent, indent))

    def align(self, names: Iterable[str]) -> None:
        """Aligns descriptions in one column to the right of all these names."""
        self.names = min(max(map(len, names), default=0), _NAMES)

    def write_dl(self, rows, col_max: int = _NAMES, col_spacing: int = 2) -> None:
        rows, indent = list(rows), self.current_indent
        width = self.names + col_spacing
        if self.width < _NARROW:
            width = 0
        for name, text in rows:
            first, rest = f"{'':{indent}}{name}", " " * (indent + (width or 4))
            if len(name) + col_spacing > width or not text:
                self.write(f"{first}\n")
                first = rest
            if text:
                self.write(self._filled(text, f"{first:{len(rest)}}", rest))

    def _filled(self, text: str, first: str, rest: str) -> str:
        return (
            textwrap.fill(
                text,
                self.width,
                initial_indent=first,
                subsequent_indent=rest,
                break_long_words=False,
                break_on_hyphens=False,
            )
            + "\n"
        )


class _Helpful:
    """Common base of commands and groups: help, and flags for output."""

    params: list[Any]
    help: str | None

    def get_params(self, ctx) -> list[Any]:
        *found, last = super().get_params(ctx)  # pyright: ignore
        return [*found, *_OUTPUT, last]

    def get_help(self, ctx) -> str:
        formatter = _Formatter()
        self.format_help(ctx, formatter)  # pyright: ignore
        return formatter.getvalue().rstrip("\n")

    def format_help_text(self, ctx, formatter) -> None:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(inspect.cleandoc(self.help or ""))

    def format_options(self, ctx, formatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        sections |= {name: [] for name in _SECTIONS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                section = getattr(param, "rich_help_panel", None) or "Options"
                if param.param_type_name == "argument":
                    section = "Arguments"
                elif param.name == "help":
                    section = "Output"
                sections[section].append(record)
        formatter.align(name for rows in sections.values() for name, _ in rows)
        for name, rows in sections.items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows)


class Command(_Helpful, typer.core.TyperCommand):
    """Command of a verb."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        given = list(args)
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            raw = self.make_parser(ctx).parse_args(args=given)[0]
            self._check(raw, ctx.params)
        return rest

    def _check(self, raw: dict[str, Any], values: dict[str, Any]) -> None:
        """Refuses empty texts and numbers out of range, before the verb runs.

        Args:
            raw: words of the command line, by parameter.
            values: values that Typer parsed from them.

        Raises:
            ConfigError: naming the flag.
        """
        assert self.callback is not None
        annotations = inspect.signature(self.callback).parameters
        for param in self.params:
            metadata = getattr(annotations[param.name].annotation, "__metadata__", ())
            name = param.opts[0] if param.param_type_name == "option" else param.metavar
            words = raw.get(param.name)
            if "" in (words if isinstance(words, list | tuple) else [words]) and (
                flags.MAY_BE_EMPTY not in metadata
            ):
                raise ConfigError(f"{name} must not be empty")
            value = values.get(param.name)
            check_number(name, value, metadata)
            for mark in metadata:
                if isinstance(mark, flags.Reads) and value is not None:
                    mark.function(value)


class Group(_Helpful, typer.core.TyperGroup):
    """Command group: a word with verbs under it."""

    def format_options(self, ctx, formatter) -> None:
        super().format_options(ctx, formatter)
        summaries = self.summaries()
        formatter.align(name for name, _ in summaries)
        with formatter.section("Commands"):
            formatter.write_dl(summaries)

    def summaries(self) -> list[tuple[str, str]]:
        """Returns verbs with their one-sentence summaries."""
        return [
            (name, (each.help or "").partition("\n\n")[0]) for name, each in self.commands.items()
        ]

    def resolve_command(self, ctx, args: list[str]):
        if not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            known = self.list_commands(ctx)
            word = reading.printable(args[0], _SHOWN)
            ctx.fail(f"No such command '{word}'{flags.did_you_mean(args[0], known)}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx, incomplete: str):
        found = [
            CompletionItem(name, help=summary)
            for name, summary in self.summaries()
            if name.startswith(incomplete) and " " not in name
        ]
        return found + super(typer.core.TyperGroup, self).shell_complete(ctx, incomplete)


def complaint(error: Any) -> str:
    """Formats a usage error as one line."""
    param, message = getattr(error, "param", None), error.format_message().rstrip(".")
    cause = error.__cause__
    if type(error).__name__ == "NoSuchOption":
        word = reading.printable(error.option_name, _SHOWN)
        return f"No such option: {word}{flags.did_you_mean(word, error.possibilities or ())}"
    if param is None or type(error).__name__ != "BadParameter":
        return message
    name = param.opts[0] if param.param_type_name == "option" else param.metavar
    if not hasattr(cause, "errors"):  # of a parser of ours
        return f"{name} {error.message}"
    fault = cause.errors()[0]
    word = reading.printable(fault["input"], _SHOWN)
    choices = param.type_descriptor.choices
    if choices:
        return flags.not_one_of(name, word, choices)
    if fault["type"] == "int_parsing_size":
        return f"{name} {word} is too large a number"
    kind = {int: "a whole number", float: "a number"}.get(param.type_descriptor.annotation)
    return f"{name} '{word}' must be {kind}" if kind else f"{name} '{word}': {message}"


def _flag(level: Level, text: str, *names: str) -> Any:
    """A flag that chooses how much is said, before anything is."""

    def choose(wanted: bool) -> None:
        if wanted and verbosity.get() not in (Level.SHORT, level):
            raise ConfigError("--quiet contradicts --verbose: leave one out")
        if wanted:
            verbosity.set_level(level)

    return typer.Option(
        *names,
        help=text,
        callback=choose,
        is_eager=True,
        expose_value=False,
        rich_help_panel="Output",
    )


_MORE = "Say more on stderr: pages, slices, memory and attention in full."
_LESS = "Say nothing on stderr but errors."


def _output(
    verbose: Annotated[bool, _flag(Level.DETAIL, _MORE, "--verbose", "-v")] = False,
    quiet: Annotated[bool, _flag(Level.NONE, _LESS, "--quiet", "-q")] = False,
) -> None:
    """Say more or less on stderr."""


_OUTPUT = command("output", _output).params
