"""batch: answer a file of requests, in runs that can be resumed."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_jax.batch import lockstep
from qwen_jax.batch import run as batches
from qwen_jax.batch.lines import Input
from qwen_jax.batch.reader import Defaults, ParsedLine, Reader
from qwen_jax.batch.results import Results
from qwen_jax.batch.run import Item, Totals
from qwen_jax.cli.answer import front, interrupts
from qwen_jax.cli.flags import AnswerFlags, Kv, ModelArgument, ModelFlags, note, option
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.cli.profile import profiled
from qwen_jax.cli.progress import Progress
from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.distributed.verbosity import Level
from qwen_jax.files import reading
from qwen_jax.llm import sessions
from qwen_jax.llm.llm import LLM, Session
from qwen_jax.llm.model import Model
from qwen_jax.llm.options import Within
from qwen_jax.storage import atomic


@expand_on_hosts
@profiled
def batch(
    model: ModelArgument,
    requests: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="Requests, one OpenAI batch line each.", show_default=False
        ),
    ],
    results: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Results; a file of this batch is continued.", show_default=False
        ),
    ],
    model_flags: ModelFlags,
    answer_flags: AnswerFlags,
    max_seqs: Annotated[
        int,
        typer.Option(help="Requests that run at once; with data=N, in each replica."),
        Within(1),
    ] = 8,
    price_per_hour: Annotated[
        float | None,
        option("Dollars that a device costs in an hour, to say what requests cost."),
        Within(0, 1_000_000),
    ] = None,
    dry_run: Annotated[
        bool, option("Say what the lines come to and whether it fits; run nothing.", "--dry-run")
    ] = False,
    kv: Kv = None,
    topology: Annotated[
        str | None,
        option("Devices that --dry-run plans for, as in `plan`; the CPU.", metavar="KIND:SIZE"),
    ] = None,
):
    """Answer a file of requests in OpenAI's batch format.

    Flags are for lines that do not say. A field that cannot be honoured makes its line
    an error record, which names it. A run that was stopped is continued by the same
    command: lines with a result are skipped. Exits with 0 when every line has a result,
    with 75 after SIGTERM. With --kv the question of each line is about the files of a
    session. docs/batch.md has the format.

    Examples:
        qwen-jax batch ckpt/7b-1m requests.jsonl results.jsonl --max-seqs 16
        qwen-jax batch ckpt/7b-1m questions.jsonl results.jsonl --kv kv/book
        qwen-jax batch ckpt/7b-1m requests.jsonl results.jsonl --dry-run --topology v5e:4x4
    """
    began = time.monotonic()
    if topology is not None and not dry_run:
        raise ConfigError(f"--topology {topology} is for --dry-run: add it or leave this out")
    if dry_run and not multihost.is_alone():
        raise ConfigError("--dry-run is for one process: start it once, with --num-processes 1")
    with interrupts(signal.SIGTERM) as stopped:
        llm = front(model, model_flags, answer_flags, kv, max_seqs=max_seqs)
        reader = _reader(llm, answer_flags)
        # Process 0 alone reads and writes files.
        source = Input(requests) if multihost.is_first() else None

        def scan() -> dict[str, int]:
            assert source is not None
            if not dry_run:
                _check_output(requests, results)
            return dataclasses.asdict(_scan(source, reader, stopped, show=dry_run))

        total = _Total(**multihost.broadcast_json(scan))
        if stopped():
            _leave(stopped())
        if dry_run and source is not None:
            _plan(llm.opened, source, reader, total, max_seqs, topology, price_per_hour)
            return
        try:
            _answer(llm, source, reader, results, total, price_per_hour, began, stopped)
        except multihost.Preempted as error:
            raise multihost.Preempted(f"{error}: the same command goes on") from None


@dataclasses.dataclass(slots=True, kw_only=True)
class _Total(Totals):
    """Totals over all lines; `new_tokens` are those of the longest possible answers.

    Attributes:
        longest: most tokens of a prompt and its longest possible answer together.
        longest_line: line number of that prompt.
    """

    longest: int = 0
    longest_line: int = 0


def _reader(llm: LLM | Session, flags: AnswerFlags) -> Reader:
    """Builds the reader of lines, with the flags as defaults."""
    opened, kept, tokenizer = llm.opened, llm.kept, llm.tokenizer
    sampling, stops = flags.sampling(opened.generation), flags.stops()
    note(flags.described(sampling), Level.DETAIL)
    return Reader(
        tokenizer=tokenizer,
        defaults=Defaults(max_new_tokens=flags.max_new_tokens, sampling=sampling, stop=stops),
        vocab_size=opened.config.vocab_size,
        max_len=opened.max_len,
        eos_ids=opened.end_ids(tokenizer),
        prefix=kept.tokens if kept else (),
        in_turn=kept is not None and kept.session.identity.is_chat,
    )


def _check_output(requests: Path, results: Path) -> None:
    """Checks, before long work, that the output can be written and is not the input."""
    atomic.prepare(results)
    if results.exists() and os.path.samefile(requests, results):
        raise ConfigError(f"{results} is the file of the requests: name another output")


def _scan(
    source: Input, reader: Reader, stopped: Callable[[], int], *, show: bool = False
) -> _Total:
    """Computes the totals over the lines; two lines of one `custom_id` are an error.

    Args:
        show: print a row for each line.
    """
    total = _Total()
    if show:
        print(f"{'line':>8}  {'prompt':>10}  {'answer':>10}  custom_id")
    for line, asked in batches.items(source, reader):
        if stopped():
            break
        if isinstance(asked, ParsedLine):
            prompt, new = len(asked.request.prompt), asked.request.max_new_tokens
            total.answered += 1
            total.prompt_tokens += prompt
            total.new_tokens += new
            total.work += asked.size
            if asked.size > total.longest:
                total.longest, total.longest_line = asked.size, line.number
            row = f"{prompt:>10,}  {new:>10,}  {line.custom_id}"
        else:
            total.refused += 1
            row = f"{'error':>10}  {'':>10}  {line.custom_id or '(none)'}: {asked}"
        if show:
            print(f"{line.number:>8,}  {reading.shown(row)}")
    if not total.lines and not stopped():
        raise ConfigError(f"{source.path} has no lines: give at least one request")
    return total


def _plan(
    opened: Model,
    source: Input,
    reader: Reader,
    total: _Total,
    max_seqs: int,
    topology: str | None,
    price: float | None,
) -> None:
    """Prints totals over the lines, and the planner's estimate for the longest."""
    from qwen_jax.cli import plan
    from qwen_jax.distributed import sharding
    from qwen_jax.engine import memory
    from qwen_jax.planner import devices

    print(
        f"\n{_count(total.answered, 'request')} and {_count(total.refused, 'error')}, "
        f"{_count(total.prompt_tokens, 'prompt token')}, at most {total.new_tokens:,} new"
    )
    if not total.answered:
        return
    print(f"the longest is line {total.longest_line:,} with {total.longest:,} tokens\n")
    if topology is None:
        if devices.found()[0].platform != "cpu":
            raise ConfigError("--dry-run plans for the CPU unless --topology says for what devices")
        mesh = opened.options.mesh
        topology = f"cpu:{1 if mesh is None else sharding.parse(mesh).size}"
    flags = opened.options
    held = len(reader.prefix)
    found = plan.examine(
        opened,
        topology,
        total.longest,
        flags.mesh,
        flags.dtype,
        sequences=max_seqs,
        prefix_tokens=held,
    )
    plan.report(found)
    read = memory.prefill_flops(opened.config, held) if held else 0.0
    flops = sum(
        memory.prefill_flops(opened.config, len(asked.request.prompt)) - read
        for _, asked in batches.items(source, reader)
        if isinstance(asked, ParsedLine)
    )
    text = f"prefill of all lines: {flops / 1e15:,.3g} PFLOP if dense"
    device, count = devices.topology(topology).device, found["devices"]
    if device.flops:
        seconds = flops / device.flops / count
        text += f", at least {seconds:,.1f} s at the published peak"
        if price is not None:
            text += f" and ${seconds / 3600 * count * price:,.2f}"
    print(text)
    raise typer.Exit(0 if found["fits"] else 1)


def _answer(
    llm: LLM | Session,
    source: Input | None,
    reader: Reader,
    path: Path,
    total: _Total,
    price: float | None,
    began: float,
    stopped: Callable[[], int],
) -> None:
    """Answers every line, until it is stopped, and prints time and cost.

    Args:
        source: input file; None in a process that neither reads lines nor writes records.
    """
    llm.opened.mesh()  # before anything asks for devices
    there, done, engine, records = Totals(), Totals(), None, None
    with contextlib.ExitStack() as stack:
        if source is not None:
            records = stack.enter_context(Results(path, _settings(llm, reader)))

        def missing() -> Iterator[Item]:
            assert source is not None
            assert records is not None
            return batches.missing(batches.items(source, reader), records, there)

        items = lockstep.items(missing, reader.prefix)
        first = next(items, None)
        if first is not None:
            engine = llm.engine_for(max(total.longest, 1), whole_slices=True)
            with contextlib.closing(Progress()) as progress:
                done = batches.run(
                    engine,
                    reader.tokenizer,
                    itertools.chain([first], items),
                    lockstep.NullSink() if records is None else records,
                    model=llm.opened.directory.resolve().name,
                    stopped=stopped,
                    on_step=shown(progress, total, there),
                )
        if records is None:
            return
        seconds = time.monotonic() - began
        note(
            f"{_count(done.answered, 'answer')} and {_count(done.refused, 'error')} "
            f"in {seconds:,.1f} s: {_count(done.prompt_tokens, 'prompt token')}, "
            f"{done.new_tokens:,} new"
        )
        if price is not None and engine is not None:
            note(_cost(seconds, engine.num_devices, price, done.lines))
        errors = _count(records.num_errors, "error")
        note(f"{path} holds {_count(len(records), 'result')}, of them {errors}")
        if there.lines + done.lines < total.lines:
            _leave(stopped())


def _settings(llm: LLM | Session, reader: Reader) -> dict[str, Any]:
    """Returns everything that the results depend on but the lines, for JSON."""
    opened, kept = llm.opened, llm.kept
    flags, defaults = opened.options, reader.defaults
    session = {} if kept is None else {"kv": kept.session.identity.tokens_sha256[:16]}
    return {
        **session,
        **opened.settings(),
        "model": _fingerprint(opened.directory),
        "dtype": opened.precision()[0],
        "kernels": flags.kernels or "auto",
        "slice": flags.slice or "auto",
        "max_len": opened.max_len,
        "max_new_tokens": defaults.max_new_tokens,
        "stop": list(defaults.stop),
        **dataclasses.asdict(defaults.sampling),
    }


def _fingerprint(directory: Path) -> str:
    """Returns a checksum of a model and its tokenizer, the same before and after conversion."""
    files = sessions.tokenizer_fingerprint(
        directory, (*sessions.TOKENIZER_FILES, "generation_config.json")
    )
    both = sessions.weights_fingerprint(directory, note) + files
    return hashlib.sha256(both.encode()).hexdigest()[:16]


def _cost(seconds: float, num_devices: int, price: float, requests: int) -> str:
    cost = seconds / 3600 * num_devices * price
    each = f", ${cost / requests:,.6f} a request" if requests else ""
    return f"${cost:,.4f}{each} ({num_devices} x ${price:,.2f} an hour)"


def _leave(number: int) -> None:
    """Ends a run that a signal has stopped."""
    if number == signal.SIGTERM:
        note("stopped by SIGTERM: the same command goes on")
        raise typer.Exit(multihost.PREEMPTED)
    raise KeyboardInterrupt


def shown(progress: Progress, total: Totals, there: Totals) -> Callable[[Totals], None]:
    """A callback for what has been done.

    Args:
        there: of `total`, what needs no more work.
    """
    return lambda done: progress.update(
        done.work, total.work - there.work, _described(done, total, there)
    )


def _described(done: Totals, total: Totals, there: Totals) -> str:
    """Formats progress as a line: `5 of 12 lines, 1 error, 1,234 + 56 tokens`."""
    return (
        f"{done.lines + there.lines:,} of {_count(total.lines, 'line')}, "
        f"{_count(done.refused + there.refused, 'error')}, "
        f"{done.prompt_tokens:,} + {done.new_tokens:,} tokens"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
