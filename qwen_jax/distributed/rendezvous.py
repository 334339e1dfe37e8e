"""Rendezvous: processes of one job find each other and compare what they run, before jax starts.

Process 0 listens where jax's coordination service will. Each other process sends one line of JSON,
its number and its facts, and gets one back, with the reason if the job is refused. jax alone
would wait, or take the second of two processes with one number for the first one restarted.
"""

import contextlib
import dataclasses
import hashlib
import json
import selectors
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from qwen_jax.config import ConfigError
from qwen_jax.files import reading

_LINE_BYTES = 1 << 20  # the longest line that is read
_LINE_S = 5.0  # a peer sends its line within this time
_TURN_S = 0.2  # process 0 looks at the clock at least as often
_WAITING = 64  # connections whose line is awaited at a time
_NOTES = 5  # addresses of strangers that are named
_DIFFERENCES = 20  # that are named
_SHOWN = 60  # characters of a value
_ADVICE = "start the same command on all hosts"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process is in its job.

    Attributes:
        coordinator: host and port of the coordination service, which process 0 runs.
        bind: address and port that it listens on.
        process: number of this process, from 0.
        count: processes in all.
        detected: jax found some of it in the environment, and finds this process's devices there.
    """

    coordinator: str
    bind: str
    process: int
    count: int
    detected: bool = False


def split(address: str) -> tuple[str, int]:
    """Host and port of an address; an IPv6 address is in brackets.

    Raises:
        ConfigError: if it is not HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    is_number = port.isascii() and port.isdecimal() and len(port) <= 5
    if not host or not is_number or not 0 < int(port) < 2**16:
        shown = reading.printable(address)
        raise ConfigError(f"--coordinator {shown} must be HOST:PORT, such as 10.0.0.1:8476")
    return host.removeprefix("[").removesuffix("]"), int(port)


def meet(
    place: Place,
    facts: Mapping[str, str],
    timeout: float,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Returns when all processes are there and their facts agree.

    Args:
        facts: by name, what must be the same in all processes.
        timeout: seconds to wait for the others.
        note: told of connections that are from no process of the job.

    Raises:
        ConfigError: if a process is missing, there twice, or differs.
    """
    deadline = time.monotonic() + timeout
    if place.process == 0:
        _gather(place, facts, timeout, deadline, note)
    else:
        _report(place, {"facts": facts}, timeout, deadline)


def withdraw(place: Place, reason: str, timeout: float) -> None:
    """Tells process 0 why this one does not come, if it can be told."""
    with contextlib.suppress(ConfigError):
        _report(place, {"reason": reason}, timeout, time.monotonic() + timeout)


def differences(facts: Mapping[int, Mapping[str, str]]) -> str:
    """What differs between processes: each name, its values and who has them; "" for nothing."""
    found = []
    for name in {name: None for each in facts.values() for name in each}:
        values: dict[str, list[int]] = {}
        for process, each in sorted(facts.items()):
            values.setdefault(each.get(name, "missing"), []).append(process)
        if len(values) > 1:
            said = [f"{_shown(value)} on {_processes(have)}" for value, have in values.items()]
            found.append(f"{reading.printable(name, _SHOWN)} is {' and '.join(said)}")
    return "; ".join(found[:_DIFFERENCES])


def _gather(
    place: Place,
    facts: Mapping[str, str],
    timeout: float,
    deadline: float,
    note: Callable[[str], None],
) -> None:
    """What process 0 does: waits for all others, compares, and tells them."""
    here: dict[int, socket.socket] = {}
    told = {0: facts}
    refused = None
    with _listening(place.bind) as server, contextlib.ExitStack() as stack:
        callers = stack.enter_context(contextlib.closing(_callers(server, stack, note)))
        while refused is None:
            here = {process: peer for process, peer in here.items() if not _gone(peer)}
            if len(here) == place.count - 1:
                break
            if time.monotonic() >= deadline:
                missing = sorted(set(range(1, place.count)) - set(here))
                refused = (
                    f"{_processes(missing)} of {place.count} did not come to "
                    f"{place.coordinator} within {timeout:g} s: {_ADVICE}"
                )
                break
            heard = next(callers)
            if heard is None:
                continue
            peer, message = heard
            process = message["process"]
            if "reason" in message:
                refused = f"process {process} ended: {reading.printable(message['reason'], 2000)}"
            elif not 0 < process < place.count:
                refused = f"a process says it is {process} of {place.count}: {_ADVICE}"
            elif process in here and not _gone(here[process]):
                hosts = [each.getpeername()[0] for each in (here[process], peer)]
                refused = (
                    f"two processes, on {' and '.join(hosts)}, say they are process {process} "
                    f"of {place.count}: give each a --process-id of its own"
                )
            else:
                told[process] = message["facts"]
                here[process] = peer
                continue
            _write(peer, {"refused": refused})
        if refused is None and (found := differences(told)):
            refused = f"the processes differ: {found}; {_ADVICE}"
        for peer in here.values():
            _write(peer, {"refused": refused})
    if refused is not None:
        raise ConfigError(refused)


def _callers(
    server: socket.socket, stack: contextlib.ExitStack, note: Callable[[str], None]
) -> Generator[tuple[socket.socket, dict[str, Any]] | None, None, None]:
    """Connections and what they say, as it comes: none keeps the others waiting.

    What says something else, or nothing in time, is closed.

    Args:
        stack: closes the connections in the end.

    Yields:
        None at least once in `_TURN_S` seconds.
    """
    waiting: dict[socket.socket, tuple[float, str, bytearray]] = {}
    noted: set[str] = set()

    def close(peer: socket.socket, why: str) -> None:
        selector.unregister(peer)
        _, address, _ = waiting.pop(peer)
        peer.close()
        if address not in noted and len(noted) < _NOTES:
            noted.add(address)
            note(f"a connection from {address} is of no process of this job ({why}): closed")

    with selectors.DefaultSelector() as selector:
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(_TURN_S):
                peer = key.fileobj
                assert isinstance(peer, socket.socket)
                if peer is server:
                    with contextlib.suppress(OSError):  # it has hung up already
                        peer, address = server.accept()
                        stack.enter_context(peer).setblocking(False)
                        selector.register(peer, selectors.EVENT_READ)
                        until = time.monotonic() + _LINE_S
                        waiting[peer] = until, str(address[0]), bytearray()
                    continue
                try:
                    line = _taken(peer, waiting[peer][2])
                    message = None if line is None else _message(line)
                except (OSError, ValueError) as error:
                    close(peer, reading.reason(error))
                    continue
                if message is not None:
                    selector.unregister(peer)
                    del waiting[peer]
                    yield peer, message
            late = [peer for peer, (until, *_) in waiting.items() if until < time.monotonic()]
            for peer in late or list(waiting)[:-_WAITING]:
                close(peer, f"it said nothing whole within {_LINE_S:g} s")
            yield None


def _taken(peer: socket.socket, line: bytearray) -> bytes | None:
    """A line, once it is whole; takes what has come of it.

    Raises:
        OSError: if the connection is broken.
        ValueError: if it ends early or is too long.
    """
    try:
        data = peer.recv(1 << 16)
    except BlockingIOError:
        return None
    line += data
    if b"\n" in data:
        return bytes(line.partition(b"\n")[0])
    if not data or len(line) > _LINE_BYTES:
        raise ValueError("its line is too long" if data else "it hung up")
    return None


def _message(line: bytes) -> dict[str, Any]:
    """What a process says: its number, and its facts or the reason why it does not come.

    Raises:
        ValueError: if a field is missing, unknown or of another type.
    """
    message = reading.parse_json(line)
    what = "reason" if isinstance(message, dict) and "reason" in message else "facts"
    reading.check_fields("the message", message, ("process", what), ValueError)
    facts = message[what] if what == "facts" else {what: message[what]}
    texts = facts.values() if isinstance(facts, dict) else [None]
    if type(message["process"]) is not int or not all(type(text) is str for text in texts):
        raise ValueError(f"process must be a number, {what} text")
    return message


def _report(place: Place, line: Mapping, timeout: float, deadline: float) -> None:
    """What another process does: finds process 0, tells it, and waits for its word."""
    fault = "it does not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(split(place.coordinator), timeout=left) as peer:
                _write(peer, {"process": place.process, **line})
                refused = _answer(peer, deadline + _LINE_S)
            if refused is None:
                return
            raise ConfigError(reading.printable(refused, 8192))
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            fault = reading.reason(error)
        time.sleep(min(0.2, max(left, 0.0)))
    raise ConfigError(
        f"process {place.process} of {place.count} did not find process 0 at {place.coordinator} "
        f"within {timeout:g} s ({fault}): {_ADVICE}"
    )


@contextlib.contextmanager
def _listening(address: str) -> Iterator[socket.socket]:
    host, port = split(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        server = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen on {address} ({error.strerror or error}): another process 0 "
            "may be there already, or --coordinator names another host or a port in use"
        ) from None
    with server:
        yield server


def _gone(peer: socket.socket) -> bool:
    """Whether the other end has closed a connection on which it has nothing more to say."""
    peer.setblocking(False)
    try:
        return peer.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _answer(peer: socket.socket, until: float) -> str | None:
    """Why process 0 refuses the job; None if it does not.

    Raises:
        OSError: if the connection breaks or nothing whole comes in time.
        ValueError: if it is no answer of process 0.
    """
    line = bytearray()
    while True:
        peer.settimeout(max(until - time.monotonic(), 0.001))
        found = _taken(peer, line)
        if found is not None:
            break
    answer = reading.parse_json(found)
    refused = reading.check_fields("its answer", answer, ("refused",), ValueError)["refused"]
    if refused is not None and type(refused) is not str:
        raise ValueError("its answer is of another type")
    return refused


def _write(peer: socket.socket, line: Mapping) -> None:
    peer.settimeout(_LINE_S)
    with contextlib.suppress(OSError):
        peer.sendall(json.dumps(line).encode() + b"\n")


def _processes(numbers: list[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _shown(value: str) -> str:
    if len(value) <= _SHOWN:
        return reading.printable(value)
    digest = hashlib.sha256(value.encode()).hexdigest()[:12]
    return f"{reading.printable(value[:_SHOWN])}... (SHA-256 {digest})"
