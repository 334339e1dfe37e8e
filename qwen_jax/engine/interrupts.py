"""Interrupts: signals that must not stop what is half done."""

import contextlib
import signal
import threading
from collections.abc import Iterator

_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Handlers in Python of signals that arrive within it, Ctrl-C's too, are called at its end.

    Each once. What the system or another library does at a signal, it does at once. Threads but
    the main one are never interrupted, so there it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived = {}
    handlers = {}
    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, lambda number, frame: arrived.update({number: frame}))
        yield
    finally:
        with contextlib.ExitStack() as calls:  # last in, first out; one that raises skips no other
            for number, frame in reversed(arrived.items()):
                calls.callback(handlers[number], number, frame)
            for number, handler in handlers.items():
                calls.callback(signal.signal, number, handler)
