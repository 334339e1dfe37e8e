"""Command line, with a file per verb."""

import contextlib
import importlib
import importlib.metadata
import io
import os
import sys
import traceback
from typing import Annotated, Any

import typer
import typer.main

from pallas_kernels.dispatch.backend import Unsupported
from qwen_jax.cli import command, flags
from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost, verbosity
from qwen_jax.engine.request import EngineError, RequestError
from qwen_jax.files.reading import FileError, printable, reason, shown
from qwen_jax.llm.documents import DocumentError
from qwen_jax.planner import devices
from qwen_jax.storage.errors import CheckpointError
from qwen_jax.text.tokenizer import TokenizerError

# Verb -> module, object in it, summary. Modules are imported when their verb is used:
# most need jax, for which `--help` should not wait.
VERBS = {
    "convert": ("convert", "convert", "Convert a Hugging Face checkpoint to an Orbax checkpoint."),
    "export": (
        "convert",
        "export",
        "Write a converted checkpoint as the Hugging Face directory it came from.",
    ),
    "download": (
        "download",
        "download",
        "Fetch a model from a Hugging Face hub into the local cache.",
    ),
    "inspect": (
        "inspect",
        "inspect",
        "Describe a checkpoint from its headers, without reading weights.",
    ),
    "verify": ("inspect", "verify", "Check that a checkpoint is whole."),
    "plan": ("plan", "plan", "Estimate memory and the longest context on a topology."),
    "export-job": (
        "export_job",
        "export_job",
        "Write the files that run a command on rented devices.",
    ),
    "doctor": (
        "doctor",
        "doctor",
        "Show versions, devices, kernels, memory, disk and missing extras.",
    ),
    "generate": ("generate", "generate", "Continue a prompt."),
    "chat": ("chat", "chat", "Talk to a model."),
    "ask": ("ask", "ask", "Answer a question about text files."),
    "prefill": (
        "prefill",
        "prefill",
        "Read a long prompt once and keep its keys and values on disk.",
    ),
    "kv": ("kv", "app", "Look at what `prefill` keeps."),
    "batch": ("batch", "batch", "Answer a file of requests in OpenAI's batch format."),
    "score": ("score", "score", "Write the logits after each token of a file."),
    "eval": ("eval", "app", "Measure what a model still finds in long texts."),
    "plot": ("plot", "app", "Draw what `eval` and `calibrate` found."),
    "calibrate": ("calibrate", "calibrate", "Find budgets of sparse prefill for every head."),
    "bench": ("bench", "bench", "Measure prefill and decode on prompts of random tokens."),
    "bench prefill": (
        "bench_long",
        "prefill",
        "Time the prefill of one long prompt of random tokens.",
    ),
    "bench decode": (
        "bench_long",
        "decode",
        "Time decoding after one long prompt of random tokens, which is prefilled first.",
    ),
    "bench kernels": (
        "kernels",
        "kernels",
        "Time prefill, sparse prefill, decode and selection on random values.",
    ),
}
# What a user can put right; anything else is a bug and shows its traceback.
_FAULTS = (
    ConfigError,
    CheckpointError,
    DocumentError,
    EngineError,
    FileError,
    RequestError,
    TokenizerError,
    Unsupported,
)


class _Verbs(command.Group):
    """The verbs, each imported when it is used."""

    def list_commands(self, ctx):
        return list(VERBS)

    def resolve_command(self, ctx, args):
        name = " ".join(args[:2])
        if len(args) > 1 and name in VERBS:
            return name, self.get_command(ctx, name), args[2:]
        longer = [verb for verb in VERBS if verb.startswith(f"{args[0]} ")]
        hint = ""
        if len(args) > 1 and os.sep not in name:
            likely = flags.did_you_mean(args[1], [verb.split()[1] for verb in longer])
            hint = likely and flags.did_you_mean(name, longer)
        if hint and not args[1].startswith("-") and not os.path.exists(args[1]):
            ctx.fail(f"No such command '{printable(name)}'{hint}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx, cmd_name):
        if cmd_name not in VERBS:
            return None
        module, name, _ = VERBS[cmd_name]
        verb = getattr(importlib.import_module(f"qwen_jax.cli.{module}"), name)
        if isinstance(verb, typer.Typer):
            return typer.main.get_command(verb)
        return command.command(cmd_name, verb)

    def summaries(self):
        return [(name, summary) for name, (_, _, summary) in VERBS.items()]


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line; returns its exit code, after at most one line about an error."""
    streams = {sys.stdout, sys.stderr} - {None}
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            code = _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            lost = _flush(*streams, sys.stdout, sys.stderr)
        if lost is not None and not code:
            code = 1 if isinstance(lost, BrokenPipeError) else _complain(_fault(lost))
    except BaseException as error:
        if multihost.is_alone():
            raise
        multihost.say_native()
        traceback.print_exc()
        code = 1
        multihost.announce(f"{type(error).__name__}: {error}", code)
    return multihost.leave(code)


def application() -> typer.Typer:
    """The command line, whose verbs are imported when they are asked for."""
    app = typer.Typer(name="qwen-jax", cls=_Verbs, **command.PLAIN)
    app.callback(help=command.teach(_root))(_root)
    return app


def _run(arguments: list[str]) -> int:
    verbosity.set_level(verbosity.Level.SHORT)
    devices.quiet_libtpu()
    try:
        return (
            application()(arguments or ["--help"], prog_name="qwen-jax", standalone_mode=False) or 0
        )
    except command.UsageError as error:
        return _usage(error)
    except _FAULTS as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(_fault(error))
    except multihost.Preempted as error:
        print(shown(error), file=sys.stderr)
        return multihost.PREEMPTED
    except (KeyboardInterrupt, typer.Abort):
        multihost.announce("it was interrupted", 130)
        return 130
    except RuntimeError as error:
        if str(error).startswith("Symlink loop"):  # pathlib's word for ELOOP
            return _complain(str(error))
        if "Unable to initialize backend" in str(error):  # of JAX_PLATFORMS
            return _complain(f"jax: {str(error).splitlines()[0]}")
        if "RESOURCE_EXHAUSTED" not in str(error):
            multihost.await_verdict()  # a process that dies takes a step of the others with it
        raise
    except ValueError as error:
        if "jax" in sys.modules:
            raise
        return _complain(  # its import has failed, which reads its variables
            f"jax cannot use a variable of the environment: {printable(error)}; correct or unset "
            "it (JAX_...)"
        )


def _version(wanted: bool) -> bool:
    if wanted:
        print(f"qwen-jax {importlib.metadata.version('qwen-jax')}")
        raise typer.Exit
    return wanted


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_version),
    ] = False,
):
    """Run Qwen2.5 models over long texts, up to a million tokens.

    Every MODEL is a local directory, a checkpoint made by `convert` or one in Hugging Face
    format as it is, or the hub id of one that `download` fetched.

    Examples:
        qwen-jax convert ~/Qwen2.5-7B-Instruct-1M ckpt/7b-1m
        qwen-jax ask ckpt/7b-1m --file book.txt "Who is the narrator?"
    """
    del version  # its callback has acted on it


def _usage(error: Any) -> int:
    """Prints the error of a command line and where to find help; returns the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        return 2
    hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
    return _complain(command.complaint(error) + hint)


def _fault(error: OSError) -> str:
    """Formats an error of the operating system, with the files that it names."""
    if error.filename is None:
        error = _flush(sys.stdout) or error
    names = [name for name in (error.filename, error.filename2) if name is not None]
    texts = [f"descriptor {name}" if isinstance(name, int) else os.fsdecode(name) for name in names]
    return f"{' -> '.join(texts)}: {reason(error)}" if texts else reason(error)


def _flush(*streams: Any) -> OSError | None:
    """Flushes streams; those that fail are silenced.

    Python would flush them once more at exit, and print the failure beside the error's line.

    Returns:
        The first failure, with the name of its stream.
    """
    failed = None
    for stream in streams:
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError as error:
            error.filename = error.filename or stream.name
            failed = failed or error
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
    return failed


def _complain(text: str) -> int:
    text = shown(text.strip())
    multihost.announce(text, 2)
    with contextlib.suppress(OSError):  # then there is nobody to tell
        print("error:", text, file=sys.stderr)
    return 2
