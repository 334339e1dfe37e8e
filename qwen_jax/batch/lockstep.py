"""Batches in multi-process jobs: process 0 reads the lines and alone keeps the records."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from qwen_jax.batch.lines import Line
from qwen_jax.batch.openai_schema import APIError
from qwen_jax.batch.reader import ParsedLine
from qwen_jax.batch.results import Record
from qwen_jax.batch.run import Item
from qwen_jax.distributed import multihost
from qwen_jax.engine.request import Request, Sampling


class NullSink:
    """Sink that discards records, for processes other than the first."""

    def add(self, *records: Record) -> None:
        """Discards records: process 0 keeps the same ones."""


def items(read: Callable[[], Iterator[Item]], prefix: tuple[int, ...] = ()) -> Iterator[Item]:
    """Yields the items that process 0 reads in all processes of a job, without bodies of lines.

    All processes must iterate at the same steps.

    Args:
        read: returns the items; called by process 0 alone.
        prefix: token ids that all prompts begin with, which are not sent.
    """
    if multihost.is_alone():
        yield from read()
        return
    found = read() if multihost.is_first() else iter(())
    while (
        sent := multihost.broadcast_json(lambda: _encoded(next(found, None), len(prefix)))
    ) is not None:
        yield _decoded(sent, prefix)


def _encoded(item: Item | None, known: int) -> dict[str, Any] | None:
    """Encodes an item as JSON, without the first `known` tokens of its prompt."""
    if item is None:
        return None
    line, asked = item
    names = ("number", "custom_id", "id", "url")
    sent: dict[str, Any] = {"line": {name: getattr(line, name) for name in names}}
    if isinstance(asked, APIError):
        return sent | {
            "error": {
                "message": str(asked),
                "code": asked.code,
                "param": asked.param,
                "status": asked.status,
            }
        }
    request = asked.request
    sampling = dataclasses.asdict(request.sampling)
    # Not the whole by asdict, which copies token by token.
    fields = {name: getattr(request, name) for name in ("max_new_tokens", "eos_ids")}
    fields["prompt"] = request.prompt[known:]
    return sent | {"request": fields, "sampling": sampling, "stop": asked.stop}


def _decoded(sent: dict[str, Any], prefix: tuple[int, ...]) -> Item:
    line = Line(**sent["line"])
    if "error" in sent:
        return line, APIError(**sent["error"])
    fields = sent["request"]
    request = Request(
        prompt=(*prefix, *fields["prompt"]),
        max_new_tokens=fields["max_new_tokens"],
        sampling=Sampling(**sent["sampling"]),
        eos_ids=tuple(fields["eos_ids"]),
    )
    return line, ParsedLine(line=line, request=request, stop=tuple(sent["stop"]))
