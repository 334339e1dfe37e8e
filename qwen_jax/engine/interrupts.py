"""Interrupts: deferral of signals while state is inconsistent."""

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
    """Defers Python's handlers of signals, that of Ctrl-C included, to the end of the context.

    Each handler is called at most once. Handlers of the system or of other libraries run at
    once. Only the main thread is interrupted by signals, so in other threads this does nothing.
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
