"""Terminal output of the commands: progress in bytes, and small tables."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from qwen_jax.distributed import multihost, verbosity
from qwen_jax.distributed.verbosity import Level
from qwen_jax.files import reading
from qwen_jax.storage.manifest import Progress

_LINE_EVERY_S = 10.0


@contextlib.contextmanager
def shown(label: str) -> Iterator[Progress]:
    """Yield a progress callback, of bytes done and in all, that prints to stderr in process 0."""
    if not multihost.is_first() or verbosity.get() is Level.NONE:
        yield lambda done, total: None
        return
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn(label),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=console) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    began = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_EVERY_S:
            return
        last = now
        print(described(label, done, total, now - began), file=sys.stderr, flush=True)

    yield line


def say(text: str) -> None:
    """Print one line to stderr, unless the verbosity is errors only."""
    if verbosity.get() is not Level.NONE:
        print(reading.shown(text), file=sys.stderr, flush=True)


def described(label: str, done: int, total: int, elapsed_s: float) -> str:
    """Format progress as a line: `convert: 1.2 of 15.2 GB, 240 MB/s, 58 s left`."""
    speed = done / elapsed_s
    left = f"{(total - done) / speed:.0f} s left" if speed else "time left unknown"
    return f"{label}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {speed / 1e6:.0f} MB/s, {left}"


def show(rows: Sequence[Sequence[str]], right: tuple[int, ...] = ()) -> None:
    """Print rows with their columns aligned, those with an index in `right` to the right.

    Characters that are not printable are written as escapes.
    """
    rows = [[reading.shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
