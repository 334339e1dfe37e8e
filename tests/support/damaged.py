"""Mutants of JSON files, drawn from a seed, and limits to read them in."""

import contextlib
import json
import random
import resource
import signal
from collections.abc import Iterator
from typing import Any

from support.json_mutants import mutated

# What a field may be written as beside what Python's json would write.
SCALING = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
TEXTS = [
    *("NaN", "-Infinity", "1e999", "-1", "01", "1" * 5000, "1" * 4000, "0x10", "--5", "1e16"),
    *(
        '"\\ud800"',
        '"\\u001b[2J"',
        '"float16"',
        '"yarn"',
        json.dumps(SCALING),
        "[" * 200 + "]" * 200,
    ),
    *('{"a": 1, "a": 1}', "[" * 100_000, json.dumps("x" * 100_000), json.dumps([0] * 10_000)),
]


def mutants(base: Any, count: int, seed: int) -> Iterator[bytes]:
    """Files that differ from the JSON of `base`, in values, in bytes or both."""
    rng = random.Random(seed)
    for _ in range(count):
        value = mutated({"": base}, rng).get("")
        data = json.dumps(value).encode()
        yield _damaged(data, rng) if rng.random() < 0.4 else data


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` with bytes replaced, cut, doubled or in another encoding."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    match rng.randrange(9):
        case 0:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[end:]
        case 3:
            return data[:end] + data[at:]
        case 4:
            return rng.choice(
                [b"\xef\xbb\xbf" + data, data.decode().encode("utf-16"), data + b"\0"]
            )
        case 5:  # the first field twice
            first, _, rest = data.partition(b",")
            return first + b"," + first.lstrip(b"[{ ") + b"," + rest
        case _:
            ends = [place for place, each in enumerate(data) if each in b":,["]
            start = rng.choice(ends) + 1 if ends else 0
            stop = next(
                (place for place in range(start, len(data)) if data[place] in b",]}"), start
            )
            return data[:start] + rng.choice(TEXTS).encode() + data[stop:]


@contextlib.contextmanager
def limits(memory: int) -> Iterator[None]:
    """Ends what takes more bytes of address space than there are now and these."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Ends what computes for longer, by an exception that nothing else raises."""

    def stop(*_) -> None:
        raise AssertionError(f"it took over {seconds} s of a processor")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
