"""Functions in processes of their own, which can be killed and measured.

A fork server that has imported everything makes a new process in milliseconds.
"""

import importlib.util
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable

# The socket of the server lies among temporary files, and its name may have 107 bytes.
if len(os.fsencode(tempfile.gettempdir())) > 60:
    _SOCKETS = tempfile.TemporaryDirectory(dir="/tmp")
    getattr(multiprocessing.current_process(), "_config")["tempdir"] = _SOCKETS.name  # noqa: B009
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["convert.weights", "convert.export"])


class Child:
    """A process that calls a function of a module; its result or error comes by pipe."""

    def __init__(self, function: Callable, *arguments, die_at: int | None = None, **options):
        self._pipe, theirs = _SERVER.Pipe()
        file = sys.modules[function.__module__].__file__
        named = function.__module__, file, function.__name__
        self._process = _SERVER.Process(
            target=_run, args=(theirs, named, arguments, options, die_at)
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()  # everything is imported

    def result(self):
        """Returns what the function returned; raises what it raised, EOFError if it was killed."""
        try:
            kind, value = self._pipe.recv()
        except ConnectionResetError:
            raise EOFError from None
        finally:
            self._process.join()
        if kind == "error":
            raise value
        return value

    def kill_after(self, seconds: float) -> bool:
        """Kill the process unless it ends before; whether it was killed."""
        self._process.join(seconds)
        self._process.kill()
        self._process.join()
        return self._process.exitcode == -signal.SIGKILL

    def alive(self) -> bool:
        """Returns True if the process has not ended yet."""
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        os.kill(self._process.pid, number)

    def killed(self) -> bool:
        """Wait for the end; whether it was by SIGKILL."""
        self._process.join()
        return self._process.exitcode == -signal.SIGKILL


def run(function: Callable, *arguments, **options):
    """The result of a function in a process of its own."""
    return Child(function, *arguments, **options).result()


def _run(pipe, named, arguments, options, die_at):
    from support import compilation

    compilation.optimize(False)
    work = _function(*named)
    pipe.send("ready")
    if die_at is not None:
        _die_at(die_at)
    try:
        pipe.send(("value", work(*arguments, **options)))
    except Exception as error:
        pipe.send(("error", error))


def _function(module: str, file: str, name: str) -> Callable:
    """A function of a module, which lies on no path if it is one of tests."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(module, file)
        found = sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return getattr(found, name)


def _die_at(number: int) -> None:
    """Kill this process right before its `number`-th change of the file system."""
    events = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "ctypes.dlsym"}
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event in events or writes:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def convert(*arguments, **options) -> list[tuple[str, str]]:
    """Names and checksums of the tensors that `weights.convert` made."""
    from convert import weights

    return sums(weights.convert(*arguments, **options))


def sums(manifest) -> list[tuple[str, str]]:
    return [(tensor.name, tensor.sha256) for tensor in manifest.tensors]


def stage(output, text, *, exchange=True, overwrite=True):
    """Publish a directory with one file, as conversion does with many."""
    from convert import publish

    if not exchange:
        publish.exchange = lambda *_: False
    with publish.Staging(output) as staging:
        there = staging.begin(
            {"text": text},
            overwrite=overwrite,
            resume=True,
            same=lambda path: read(path) == text,
            check_ours=read,
            writes=lambda _: True,
        )
        if there:
            return
        (staging.directory / "sub").mkdir(exist_ok=True)
        (staging.directory / "sub" / "file").write_text(text)
        staging.publish()


def read(directory) -> str:
    return (directory / "sub" / "file").read_text()


def peak_memory(work: Callable, *arguments, **options) -> tuple[int, int]:
    """Peak bytes of memory of this process before and after a call."""
    import jax

    from support import compilation

    compilation.optimize(True)  # which decide about copies
    jax.block_until_ready(jax.numpy.zeros(1))  # the backend is no part of the work
    before = peak()
    work(*arguments, **options)
    return before, peak()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
