"""prefill: read a long prompt once and keep its keys and values on disk."""

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from qwen_jax.cli import tokens as token_file
from qwen_jax.cli.answer import interrupts, prefill_progress
from qwen_jax.cli.ask import Exclude, Files, print_table
from qwen_jax.cli.flags import ModelArgument, ModelFlags, System, note, option, spelled
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.cli.profile import profiled
from qwen_jax.cli.quantities import tokens_option
from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost, sharding
from qwen_jax.llm import documents, sessions
from qwen_jax.llm.model import Model, open_model
from qwen_jax.llm.options import Within
from qwen_jax.storage.kv_session import Session, Writer


@expand_on_hosts
@profiled
def prefill(
    model: ModelArgument,
    model_flags: ModelFlags,
    out: Annotated[Path, option("Directory of the session.", metavar="DIR")],
    file: Files = None,
    exclude: Exclude = None,
    system: System = None,
    prompt_file: Annotated[Path | None, option("A UTF-8 file of raw text, for `generate`.")] = None,
    tokens: Annotated[
        Path | None, option("A file of token ids, for `generate`: a JSON list, or integers.")
    ] = None,
    save_every: Annotated[
        int,
        tokens_option(
            "Tokens between two savings, in memory twice while they are saved.", shown=True
        ),
        Within(1),
    ] = 65536,
    overwrite: Annotated[
        bool, option("Replace another session that is there.", "--overwrite")
    ] = False,
):
    """Read a long prompt once and keep its keys and values on disk.

    `ask`, `chat`, `generate` and `batch` go on after it with --kv DIR, on any mesh and
    number of devices. Of --file, as in `ask`, any number of questions can be asked; raw
    text and token ids are for `generate`. A prefill that was stopped or killed goes on
    with the same command where it saved last; after SIGTERM it saves and exits with 75.
    On several hosts DIR must be the same directory for all.

    Examples:
        qwen-jax prefill ckpt/7b-1m --file book.txt --out kv/book
        qwen-jax ask ckpt/7b-1m --kv kv/book "Who is the narrator?"
    """
    given = {"--file": file or None, "--prompt-file": prompt_file, "--tokens": tokens}
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) != 1:
        raise ConfigError(f"give one of {', '.join(given)}, not {' and '.join(named) or 'none'}")
    if system is not None and not file:
        raise ConfigError(f"--system contradicts {named[0]}, which is raw: leave it out")
    if exclude and not file:
        raise ConfigError(f"--exclude contradicts {named[0]}, which is raw: leave it out")
    began = time.monotonic()
    with interrupts(signal.SIGTERM) as stopped:
        if model_flags.mesh is not None and sharding.parse(model_flags.mesh).data > 1:
            raise ConfigError(
                f"--mesh {model_flags.mesh}: one prompt has no replicas: leave data out"
            )
        opened = open_model(model, model_flags)
        rows, ids = _prompt(opened, file, exclude, system, prompt_file, tokens)
        if rows:
            print_table(rows, len(ids), opened.max_len)
        opened.check_fits(len(ids))
        with Writer(
            out,
            sessions.identity(opened, ids, is_chat=bool(file)),
            ids,
            documents=tuple(rows),
            versions=sessions.versions(),
            overwrite=overwrite,
        ) as writer:
            before = writer.session.saved
            if before == len(ids):
                note(f"{out} is complete already: {_described(writer.session)}")
                return
            if before:
                note(f"{out} holds {before:,} of {len(ids):,} tokens: going on there")
            _fill(opened, ids, writer, save_every, stopped)
            seconds = time.monotonic() - began
            note(
                f"{len(ids) - before:,} tokens in {seconds:,.1f} s; "
                f"{out} is complete: {_described(writer.session)}"
            )


def _prompt(
    opened: Model,
    file: list[Path] | None,
    exclude: list[str] | None,
    system: str | None,
    prompt_file: Path | None,
    tokens: Path | None,
) -> tuple[list[tuple[str, int]], tuple[int, ...]]:
    """Returns the names of the files with their numbers of tokens, and the ids of the prompt."""
    if tokens is not None:
        return [], tuple(
            multihost.broadcast_json(lambda: token_file.read(tokens, opened.config.vocab_size))
        )
    tokenizer = opened.tokenizer()
    if prompt_file is not None:
        text = multihost.broadcast_json(lambda: documents.read_text(prompt_file))
        if not text:
            raise ConfigError(f"{prompt_file} is empty: give at least one character")
        return [], tuple(tokenizer.encode_prompt(text))
    tokenizer.check_chatml()

    def read() -> tuple[list[tuple[str, int]], list[int]]:
        texts = documents.read(file or (), skipped=note, exclude=exclude or (), spell=spelled)
        rows, ids = sessions.files_prompt(tokenizer, texts, system)
        return rows, list(ids)

    rows, ids = multihost.broadcast_json(read)
    return [(name, count) for name, count in rows], tuple(ids)


def _fill(
    opened: Model,
    ids: tuple[int, ...],
    writer: Writer,
    save_every: int,
    stopped: Callable[[], int],
) -> None:
    """Prefills and saves the tokens that are not saved yet.

    Raises:
        multihost.Preempted: in all processes of a job, after all prefilled tokens are saved.
        RequestError: if the model's logits are not finite.
        SessionError: if the disk is full or fails.
    """
    filling = sessions.Filling(opened, ids, writer, save_every)
    progress = prefill_progress(len(ids))
    with contextlib.closing(progress):
        progress.update(filling.prefilled)
        while not filling.is_complete:
            try:
                filling.step()
            except multihost.Preempted:
                filling.save()
                note(_stopped(writer.session))
                raise
            progress.update(filling.prefilled)
            if stopped():
                filling.save()
                _leave(stopped(), writer.session)
        filling.save()


def _leave(number: int, saved: Session) -> None:
    """Ends a run that a signal has stopped."""
    note(_stopped(saved))
    if number == signal.SIGTERM:
        raise typer.Exit(multihost.PREEMPTED)
    raise KeyboardInterrupt


def _stopped(saved: Session) -> str:
    return (
        f"stopped: {saved.saved:,} of {saved.identity.num_tokens:,} tokens are saved, the same "
        "command goes on there"
    )


def _described(found: Session) -> str:
    return f"{found.saved:,} tokens, {found.num_bytes / 1e9:.3f} GB"
