"""Rendezvous: processes of one job find each other and compare what they run, before jax starts.

Process 0 listens where jax's coordination service will. Each other process sends one line of JSON,
its number and its facts, and gets one back, with the reason if the job is refused. jax alone
would wait, or take the second of two processes with one number for the first one restarted.
"""

import contextlib
import dataclasses
import hashlib
import json
import socket
import time
from collections.abc import Iterator, Mapping

from qwen_jax.config import ConfigError

_LINE_BYTES = 1 << 20  # the longest line that is read
_LINE_S = 5.0  # a peer sends its line within this time
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
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator {address} must be HOST:PORT, such as 10.0.0.1:8476")
    return host.removeprefix("[").removesuffix("]"), int(port)


def meet(place: Place, facts: Mapping[str, str], timeout: float) -> None:
    """Returns when all processes are there and their facts agree.

    Args:
        facts: by name, what must be the same in all processes.
        timeout: seconds to wait for the others.

    Raises:
        ConfigError: if a process is missing, there twice, or differs.
    """
    deadline = time.monotonic() + timeout
    if place.process == 0:
        _gather(place, facts, timeout, deadline)
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
            found.append(f"{name} is {' and '.join(said)}")
    return "; ".join(found)


def _gather(place: Place, facts: Mapping[str, str], timeout: float, deadline: float) -> None:
    """What process 0 does: waits for all others, compares, and tells them."""
    here: dict[int, socket.socket] = {}
    told = {0: facts}
    refused = None
    with _listening(place.bind) as server, contextlib.ExitStack() as stack:
        while refused is None:
            here = {process: peer for process, peer in here.items() if not _gone(peer)}
            if len(here) == place.count - 1:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                missing = sorted(set(range(1, place.count)) - set(here))
                refused = (
                    f"{_processes(missing)} of {place.count} did not come to "
                    f"{place.coordinator} within {timeout:g} s: {_ADVICE}"
                )
                break
            server.settimeout(min(left, 1.0))
            with contextlib.suppress(TimeoutError):
                peer = stack.enter_context(server.accept()[0])
                line = _read(peer, _LINE_S)
                process = line.get("process")
                if type(process) is not int:
                    peer.close()  # no process of ours
                    continue
                if "reason" in line:
                    refused = f"process {process} ended: {line['reason']}"
                elif not 0 < process < place.count:
                    refused = f"a process says it is {process} of {place.count}: {_ADVICE}"
                elif process in here and not _gone(here[process]):
                    hosts = [each.getpeername()[0] for each in (here[process], peer)]
                    refused = (
                        f"two processes, on {' and '.join(hosts)}, say they are process {process} "
                        f"of {place.count}: give each a --process-id of its own"
                    )
                else:
                    told[process] = line.get("facts", {})
                    here[process] = peer
                    continue
                _write(peer, {"refused": refused})
        if refused is None and (found := differences(told)):
            refused = f"the processes differ: {found}; {_ADVICE}"
        for peer in here.values():
            _write(peer, {"refused": refused})
    if refused is not None:
        raise ConfigError(refused)


def _report(place: Place, line: Mapping, timeout: float, deadline: float) -> None:
    """What another process does: finds process 0, tells it, and waits for its word."""
    fault = "it does not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(split(place.coordinator), timeout=left) as peer:
                _write(peer, {"process": place.process, **line})
                answer = _read(peer, max(deadline - time.monotonic(), 0.0) + _LINE_S)
            if "refused" not in answer:
                fault = "it closed the connection"
            elif answer["refused"] is None:
                return
            else:
                raise ConfigError(str(answer["refused"]))
        except OSError as error:
            fault = error.strerror or str(error)
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


def _read(peer: socket.socket, timeout: float) -> dict:
    """A line of JSON; {} if none comes that is an object."""
    peer.settimeout(timeout)
    try:
        with peer.makefile("rb") as file:
            line = json.loads(file.readline(_LINE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _write(peer: socket.socket, line: Mapping) -> None:
    peer.settimeout(_LINE_S)
    with contextlib.suppress(OSError):
        peer.sendall(json.dumps(line).encode() + b"\n")


def _processes(numbers: list[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _shown(value: str) -> str:
    if len(value) <= _SHOWN:
        return value
    digest = hashlib.sha256(value.encode()).hexdigest()[:12]
    return f"{value[:_SHOWN]}... (SHA-256 {digest})"
