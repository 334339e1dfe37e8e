"""The loop of a batch: lines into the engine as rows become free, records out as they end."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from qwen_jax.batch import results
from qwen_jax.batch.lines import BatchError, Input, Line
from qwen_jax.batch.openai_schema import APIError
from qwen_jax.batch.reader import ParsedLine, Reader
from qwen_jax.batch.results import Record, Results
from qwen_jax.engine.request import Event, Serving
from qwen_jax.text.tokenizer import Stream, Tokenizer

_REFUSALS = 64  # written at once

Item = tuple[Line, ParsedLine | APIError]
"""A line, and the request that it makes or why it makes none."""


@runtime_checkable
class Engine(Serving, Protocol):
    """What the loop needs of an engine or of replicas."""

    @property
    def max_seqs(self) -> int:
        """Requests that run at once."""
        ...


@runtime_checkable
class Kept(Protocol):
    """Where records go, such as `Results`."""

    def add(self, *records: Record) -> None:
        """Keeps records; they are on disk when this returns."""
        ...


@dataclasses.dataclass(slots=True, kw_only=True)
class Totals:
    """What lines come to.

    Attributes:
        answered: lines with an answer.
        refused: lines with an error.
        prompt_tokens: of lines with an answer.
        new_tokens: of their answers.
        work: tokens of prompts and of the longest answers, those of lines that are still
            running as far as they are.
    """

    answered: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    work: int = 0

    @property
    def lines(self) -> int:
        return self.answered + self.refused


@dataclasses.dataclass(slots=True)
class _Answering:
    """A line that the engine works on."""

    asked: ParsedLine
    stream: Stream
    parts: list[str] = dataclasses.field(default_factory=list)
    new_tokens: int = 0
    prefilled: int = 0

    def push(self, event: Event) -> None:
        self.prefilled = event.prefilled
        if event.tokens and not self.stream.stopped:
            self.new_tokens += len(event.tokens)
            self.parts.append(self.stream.push(event.tokens))

    def record(self, event: Event, model: str) -> Record:
        """What it came to, once the engine is done with it."""
        if event.error is not None:
            return results.failed(
                self.asked.line, APIError(event.error, code="not_finite", status=500)
            )
        self.parts.append(self.stream.finish())
        return results.answered(
            self.asked,
            "".join(self.parts),
            finish="stop" if self.stream.stopped or event.finish == "stop" else "length",
            new_tokens=self.new_tokens,
            model=model,
        )


def items(source: Input, reader: Reader) -> Iterator[Item]:
    """The lines of a file as requests, one at a time.

    Raises:
        BatchError: if two lines have one custom_id, or the file was changed.
        OSError: if it cannot be read.
    """
    seen: dict[bytes, int] = {}
    for line in source.lines():
        if line.custom_id is not None:
            name = line.custom_id.encode("utf-8", "surrogatepass")
            first = seen.setdefault(hashlib.blake2b(name, digest_size=16).digest(), line.number)
            if first != line.number:
                raise BatchError(
                    f"{source.path}: lines {first} and {line.number} have one custom_id, "
                    f"{line.custom_id!r}: give each its own"
                )
        try:
            yield line, reader.read(line)
        except APIError as error:
            yield line, error


def missing(asked: Iterable[Item], kept: Results, there: Totals) -> Iterator[Item]:
    """Those that have no record yet.

    Args:
        there: counts the others.

    Raises:
        BatchError: if a record is that of another line of the same name.
    """
    for line, request in asked:
        if not kept.has(line):
            yield line, request
        elif isinstance(request, ParsedLine):
            there.answered += 1
            there.work += request.size
        else:
            there.refused += 1


def run(
    engine: Engine,
    tokenizer: Tokenizer,
    asked: Iterator[Item],
    kept: Kept,
    *,
    model: str,
    stopped: Callable[[], object] = lambda: False,
    on_step: Callable[[Totals], None] = lambda _: None,
) -> Totals:
    """Gives each line a record; returns what this came to.

    No more prompts are held than twice the requests that the engine runs at once.

    Args:
        model: its name in the records.
        stopped: asked between steps; once it is true nothing more is begun, and what is
            running is left without a record.
        on_step: told after each step what has been done so far.

    Raises:
        JournalError: if a record cannot be written.
        Preempted: in all processes of a job after the same step, if it is to end.
    """
    done = Totals()
    running: dict[int, _Answering] = {}
    more = True
    while not stopped():
        records: list[Record] = []
        while more and len(running) < 2 * engine.max_seqs and len(records) < _REFUSALS:
            line, request = next(asked, (None, None))
            if line is None or request is None:
                more = False
            elif isinstance(request, APIError):
                records.append(results.failed(line, request))
            else:
                number = engine.add(request.request)
                running[number] = _Answering(request, Stream(tokenizer, stop=request.stop))
        for event in engine.step() if running else ():
            each = running[event.request_id]
            each.push(event)
            if event.finish is not None:
                records.append(each.record(event, model))
                del running[event.request_id]
                done.work += each.asked.size
                if event.error is None:
                    done.prompt_tokens += len(each.asked.request.prompt)
                    done.new_tokens += each.new_tokens
            elif each.stream.stopped:
                engine.cancel(event.request_id)
        if records:
            kept.add(*records)
            failures = sum(record["response"]["status_code"] != 200 for record in records)
            done.refused += failures
            done.answered += len(records) - failures
        elif not running and not more:
            break
        alive = sum(each.prefilled + each.new_tokens for each in running.values())
        on_step(dataclasses.replace(done, work=done.work + alive))
    return done
