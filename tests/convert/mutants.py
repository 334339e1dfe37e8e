"""Damaged and hostile versions of JSON files, drawn from a seed, and limits to read them in."""

import contextlib
import copy
import json
import resource
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np

DEEP: Any = 1
for _ in range(300):
    DEEP = [DEEP]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 64, 127, 2**16, 2**31 - 1, 2**31, 2**53, 2**63, 10**30),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -5.0, 502.5, 1e-320, 1e9, 1e16, 1e308),
    *("", "x", "1", "true", "\x1b[2J\r\n", "\u202e\x00", "\ud800", "x" * 100_000, "../../etc"),
    *("float16", "yarn", "default", "full_attention", "qwen2", "F64", "I8", "vertical_and_slash"),
    *([], {}, [[]], [{}], {"": []}, [0], [1, 2], [-1], ["x"] * 1000, list(range(1000)), DEEP),
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"chunk_size": 64, "local_size": 16},
    {f"key {number}": number for number in range(1000)},
]
NUMBERS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1",
    "01",
    "1" * 5000,
    "1" * 4000,
    "0x10",
    "--5",
]
_DUPLICATE = "@duplicate@"


def mutants(base: Any, count: int, seed: int) -> Iterator[bytes]:
    """Files that differ from the JSON of `base` in one to three places."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        value = copy.deepcopy(base)
        for _ in range(rng.integers(1, 4)):
            value = _changed(value, rng)
        text = json.dumps(value)
        if rng.random() < 0.1:
            names = _names(value)
            text = text.replace(_DUPLICATE, str(names[rng.integers(len(names))]) if names else "x")
        data = text.encode()
        yield _damaged(data, rng) if rng.random() < 0.3 else data


def _names(value: Any) -> list[str]:
    return [name for name in value if name != _DUPLICATE] if isinstance(value, dict) else []


def _changed(value: Any, rng: np.random.Generator) -> Any:
    """`value` with one thing in it replaced, removed, added, renamed or exchanged."""
    places: list[tuple[Any, Any]] = []
    pending = [value] if isinstance(value, dict | list) else []
    while pending and len(places) < 2000:
        each = pending.pop(int(rng.integers(len(pending))))
        keys = list(each) if isinstance(each, dict) else range(len(each))
        places.extend((each, key) for key in keys)
        pending.extend(each[key] for key in keys if isinstance(each[key], dict | list))
    if not places:
        return VALUES[rng.integers(len(VALUES))]
    parent, key = places[rng.integers(len(places))]
    other, twin = places[rng.integers(len(places))]
    drawn = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    match rng.integers(8):
        case 0 | 1 | 2:
            parent[key] = drawn
        case 3:
            del parent[key]
        case 4:
            parent[key] = copy.deepcopy(other[twin])
        case 5 if isinstance(parent, dict):
            parent[[_DUPLICATE, "x", "", "\x1b[2J", str(key) + " "][rng.integers(5)]] = drawn
        case 5:
            parent.insert(int(rng.integers(len(parent) + 1)), drawn)
        case 6 if isinstance(parent[key], int | float):
            number = parent[key]
            parent[key] = [number + 1, number - 1, -number, float(number), str(number), [number]][
                rng.integers(6)
            ]
        case 6:
            parent[key] = [parent[key]]
        case 7:
            return drawn if rng.random() < 0.05 else value
    return value


def _damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with bytes flipped, cut, doubled or replaced by what is no JSON."""
    at, end = sorted(int(each) for each in rng.integers(0, len(data) + 1, 2))
    number = NUMBERS[rng.integers(len(NUMBERS))].encode()
    match rng.integers(8):
        case 0:
            return data[:at] + bytes([rng.integers(256)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[end:]
        case 3:
            return data[:end] + data[at:]
        case 4:
            digits = [place for place in range(len(data)) if data[place : place + 1].isdigit()]
            place = digits[rng.integers(len(digits))] if digits else 0
            return data[:place] + number + data[place + 1 :]
        case 5:
            return [b"\xef\xbb\xbf" + data, data.decode().encode("utf-16"), data + b"\0"][
                rng.integers(3)
            ]
        case 6:
            return b"[" * int(10 ** rng.uniform(0, 6)) + data
        case _:
            return data[:at] + b'"\\ud800"' + data[at:]


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
