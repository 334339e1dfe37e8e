"""Batch loop: feeds lines to the engine as rows become free, and writes records as they end."""

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
"""A line, and its request or the error that refuses it."""


@runtime_checkable
class Engine(Serving, Protocol):
    """Interface of an engine or of replicas that the loop needs."""

    @property
    def max_seqs(self) -> int:
        """Maximum number of requests that run at once."""
        ...


@runtime_checkable
class Kept(Protocol):
    """Sink of records, such as `Results`."""

    def add(self, *records: Record) -> None:
        """Stores records; they are on disk when this returns."""
        ...


@dataclasses.dataclass(slots=True, kw_only=True)
class Totals:
    """Totals over lines.

    Attributes:
        answered: number of lines with an answer.
        refused: number of lines with an error.
        prompt_tokens: prompt tokens of lines with an answer.
        new_tokens: tokens of their answers.
        work: tokens of prompts and of the longest possible answers; of lines that are still
            running, the tokens processed so far.
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
    """A line that the engine is answering."""

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
        """Builds the record of the line from its last event."""
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
    """Yields the lines of a file with their requests.

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
    """Yields the items that have no record yet.

    Args:
        there: totals to which the others are added.

    Raises:
        BatchError: if a record is that of another line of the same `custom_id`.
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
    """Answers lines and writes a record for each; returns the totals.

    Holds at most twice as many prompts as the engine runs at once.

    Args:
        model: name of the model in the records.
        stopped: called between steps; once it returns True no line is begun, and running lines
            are left without a record.
        on_step: called after each step with the totals so far.

    Raises:
        JournalError: if a record cannot be written.
        Preempted: in all processes of a job after the same step, if the job is being preempted.
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
