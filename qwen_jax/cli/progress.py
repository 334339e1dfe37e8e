"""Progress on stderr: a bar on a terminal, elsewhere a line now and then for readable logs."""

import sys
import time
from collections.abc import Callable

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from qwen_jax.cli.console import console
from qwen_jax.cli.flags import note, says

LINE_S = 10.0
"""Seconds between two lines of progress where there is no terminal."""


class Progress:
    """Shows how much of something is done; of several processes process 0 does.

    Args:
        total: tokens to be read, unless `update` says another.
        say: is given the lines.
        clock: of seconds.
    """

    def __init__(
        self,
        total: int = 0,
        *,
        say: Callable[[str], None] = note,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._say, self._clock = total, say, clock
        self._start = self._said = clock()
        self._bar = None
        if says() and sys.stderr.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
            self._bar = Bar(*columns, console=console(stderr=True), transient=True)
            self._bar.add_task("")
            self._bar.start()

    def update(self, done: int, total: int | None = None, text: str | None = None) -> None:
        """Called after each step.

        Args:
            text: what is done, in words; None for tokens that were read.
        """
        now = self._clock()
        total = self._total if total is None else total
        if self._bar is None and (done >= total or now - self._said < LINE_S):
            return
        seconds = now - self._start
        speed = done / seconds if seconds else 0
        if text is None:
            text = f"read {done:,} of {total:,} tokens, {speed:,.0f} tokens/s"
        if self._bar is not None:
            (task,) = self._bar.task_ids
            self._bar.update(task, description=text, completed=done, total=total)
            return
        self._said = now
        left = f"{(total - done) / speed:,.0f} s left" if speed else "time left unknown"
        self._say(f"{text}, {left}")

    def close(self) -> None:
        """The bar vanishes; ignored if it has already."""
        if self._bar is not None:
            self._bar.stop()
