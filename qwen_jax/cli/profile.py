"""Profile of a command: a trace for xprof and TensorBoard, and a line of figures for each step.

    DIR/plugins/profile/RUN/HOST.xplane.pb   the trace; one file for each process of a job
    DIR/steps.jsonl                          an object a step, in order of their ends

Fields of a step: `run` (of the trace), `step` (its number in the trace, from 0), `traced`
(whether it is there), `engine` (of several that the command builds, from 0), those of
`engine.observer.Step`, `seconds` on the clock of the host, `peak_bytes` (`devices.peak_bytes`)
and `time` (when it began, in seconds since 1970). Of a job process 0 writes them.
"""

import contextlib
import dataclasses
import datetime
import functools
import os
import re
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, ClassVar

from qwen_jax.cli.flags import adding, note, option
from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.engine.observer import Observed, Step
from qwen_jax.planner import devices
from qwen_jax.storage.jsonl import Journal, JournalError

STEPS = range(64)
"""Steps that are traced by default: a million tokens in slices of 32,768, and more."""

_FIGURES = "steps.jsonl"
_OPENING = b'{"run"'


class ProfileError(ConfigError):
    """Error of a profile that cannot be written; names the directory and the remedy."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFlags:
    """Flags of every verb that can be profiled."""

    section: ClassVar[str] = "Profile"

    profile: Annotated[
        Path | None,
        option("Trace steps for xprof and TensorBoard, and write their figures.", metavar="DIR"),
    ] = None
    profile_steps: Annotated[
        str | None,
        option("Which steps are traced, 0:64; all get figures.", metavar="FIRST:COUNT"),
    ] = None

    def steps(self) -> range:
        """Returns the indices of the steps to trace.

        Raises:
            ConfigError: if they are malformed, or nothing is profiled.
        """
        given = self.profile_steps
        if given is None:
            return STEPS
        if self.profile is None:
            raise ConfigError(f"--profile-steps {given} has no effect without --profile")
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", given, re.ASCII)
        if match is None:
            raise ConfigError(
                f"--profile-steps {given!r} must be the first step and how many, "
                "such as 0:64, or 0:0 for none"
            )
        first, count = map(int, match.groups())
        return range(first, first + count)


def profiled(verb: Callable) -> Callable:
    """Wraps a verb with `ProfileFlags`, and runs it within the profile that they ask for.

    Its engines are profiled from the call of `watch` on.
    """

    @adding(verb, "profile_flags", ProfileFlags)
    def within(*, profile_flags: ProfileFlags, **given):
        steps = profile_flags.steps()
        if profile_flags.profile is None:
            return verb(**given)
        with running(profile_flags.profile, steps):
            return verb(**given)

    return within


_running: "Profile | None" = None  # of this process, in which jax makes one trace at a time


def watch(engine: Observed) -> None:
    """Adds an engine to the profile that is running, if any.

    All processes of a job must watch the same engines.

    Raises:
        ProfileError: if its files cannot be created.
        JournalError: if another run is writing them.
    """
    if _running is not None:
        _running.watch(engine)


@contextlib.contextmanager
def running(directory: Path, steps: range) -> Iterator[None]:
    """Profiles the engines that are watched within; the files are complete except after SIGKILL.

    A SIGTERM that would end this process at once raises `Preempted` instead.

    Args:
        steps: indices of the steps to trace.

    Raises:
        ProfileError: if it cannot be written there; at the end, if something failed meanwhile.
        JournalError: if another run is writing there.
        Preempted: by SIGTERM.
    """
    global _running
    check(directory)
    profile = _running = Profile(directory, steps)
    ends_at_once = multihost.is_alone() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ends_at_once:
        signal.signal(signal.SIGTERM, _stop)
    has_ended = False
    try:
        yield
        has_ended = True
    finally:
        _running, fault = None, profile.close()
        if ends_at_once:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if has_ended and fault:
            raise ProfileError(fault)
        if has_ended or fault or profile.num_ended:
            note(fault or profile.summary)  # the reason of another end comes first


def check(directory: Path) -> None:
    """Checks, before long work, that a profile can be written; writes nothing.

    Raises:
        ProfileError: if a profile cannot be written there.
        JournalError: if another run is writing there.
    """
    nearest = next(each for each in (directory, *directory.parents) if each.exists())
    if not nearest.is_dir():
        which = "" if nearest == directory else f": {nearest}"
        raise ProfileError(f"--profile {directory}{which} is a file: give a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ProfileError(f"--profile {directory}: {nearest} cannot be written to")
    figures = directory / _FIGURES
    if multihost.is_first() and figures.exists():
        if not figures.is_file() or not _holds_steps(figures):
            raise ProfileError(f"{figures} is not of a profile: name another directory")
        Journal(figures).close()


class Profile:
    """Profile of the steps of engines, which are written as they end.

    Errors of writing do not stop a step: they are reported by `close`.

    Args:
        steps: indices of the steps to trace.

    Attributes:
        num_ended: number of steps that have ended.
    """

    def __init__(self, directory: Path, steps: range):
        self._directory, self._steps = directory, steps
        self._run, self._scratch = "", directory
        self._journal: Journal | None = None
        self._lock = threading.RLock()  # replicas step in threads
        self._num_engines = self._num_begun = self.num_ended = 0
        self._num_left = len(steps)  # to be traced
        self._is_tracing = self._is_closed = False
        self._fault: str | None = None

    @property
    def summary(self) -> str:
        """Returns one line on the files that were written, and how to open them."""
        if not self.num_ended:
            return f"--profile {self._directory}: no step was run"
        text = f"{self._directory / _FIGURES}: {_count(self.num_ended)}"
        traced = range(self._steps.start, min(self._steps.stop, self._num_begun))
        if not traced:
            return f"{text}, none of them traced"
        where = shlex.quote(str(self._directory))
        return (
            f"{text}, {traced.start:,} to {traced.stop - 1:,} traced (--profile-steps); "
            f"`xprof --logdir={where}` or `tensorboard --logdir={where}` opens the trace"
        )

    def watch(self, engine: Observed) -> None:
        """Be told of an engine's steps from now on, see `watch` of this module."""
        if not self._run:
            import jax

            now = datetime.datetime.now().strftime("%Y_%m_%d_%H_%M_%S_%f")
            self._run = multihost.broadcast_json(lambda: now)
            # On a common disk the processes of one host have one name.
            self._scratch = self._directory / f".{self._run}-{jax.process_index()}"
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                if multihost.is_first():
                    self._journal = Journal(self._directory / _FIGURES)
                    self._journal.repair()
            except OSError as error:
                raise ProfileError(f"--profile {self._directory}: {error.strerror}") from None
        engine.observe(functools.partial(self._observe, self._num_engines))
        self._num_engines += 1

    def close(self) -> str | None:
        """Ends the trace and the figures; steps in flight are left out of both.

        Returns:
            Description of what could not be written, with the remedy; None if all was.
        """
        with self._lock:
            self._stop_trace()
            self._is_closed = True
            if self._journal is not None:
                self._journal.close()
        return self._fault

    @contextlib.contextmanager
    def _observe(self, engine: int, step: Step) -> Iterator[None]:
        import jax

        with self._lock:
            number, self._num_begun = self._num_begun, self._num_begun + 1
            if self._num_left and number == self._steps.start and not self._is_closed:
                options = jax.profiler.ProfileOptions()
                # Calls of Python functions would slow decoding down and fill the trace.
                options.python_tracer_level = 0
                try:
                    jax.profiler.start_trace(self._scratch, profiler_options=options)
                    self._is_tracing = True
                except RuntimeError as error:
                    self._fault = f"--profile: there is no trace: {error}"
        is_traced = number in self._steps
        began, start = time.time(), time.perf_counter()
        try:
            with jax.profiler.StepTraceAnnotation(step.kind, step_num=number):
                yield
        finally:
            seconds = time.perf_counter() - start
            with self._lock:
                self._num_left -= is_traced
                if not self._num_left:
                    self._stop_trace()
        fields = {"run": self._run, "step": number, "traced": is_traced, "engine": engine}
        fields |= dataclasses.asdict(step)
        fields |= {"seconds": seconds, "peak_bytes": devices.peak_bytes(), "time": began}
        with self._lock:
            self.num_ended += not self._is_closed
            if self._is_closed or self._journal is None or self._fault is not None:
                return
            try:
                # Waiting for the disk would come between the steps of the device.
                self._journal.append(fields, wait=False)
            except JournalError:
                self._fault = (
                    f"--profile: {self._journal.path} could not be written beyond "
                    f"{_count(self.num_ended - 1)}: free space, or name another directory"
                )

    def _stop_trace(self) -> None:
        """Ends the trace, if it is running, and moves it to its final place."""
        if not self._is_tracing:
            return
        self._is_tracing = False
        import jax

        prefix = f"{jax.process_index()}-" if multihost.count() > 1 else ""
        target = self._directory / "plugins" / "profile" / self._run
        try:
            jax.profiler.stop_trace()
            target.mkdir(parents=True, exist_ok=True)
            for path in self._scratch.glob("plugins/profile/*/*"):
                os.replace(path, target / f"{prefix}{path.name}")
        except (OSError, RuntimeError) as error:
            self._fault = f"--profile: the trace could not be written to {target}: {error}"
        shutil.rmtree(self._scratch, ignore_errors=True)


def _holds_steps(path: Path) -> bool:
    """Returns True if a file begins like a file of steps, which may be cut off early."""
    with path.open("rb") as file:
        line = file.read(len(_OPENING))
    return line == _OPENING[: len(line)]


def _count(steps: int) -> str:
    return f"{steps:,} step{'' if steps == 1 else 's'}"


def _stop(*_) -> None:
    """Handles SIGTERM while a profile is running: raises; a second one ends the process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise multihost.Preempted("stopped by SIGTERM")
