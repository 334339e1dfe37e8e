"""Hosts: several processes, one a host or more, that run one command in lock-step.

Every process does the same with the same, in the same order. Process 0 alone reads what may lie
on its host only and writes answers; the others get what it read, and are silent on stdout.
Conversion and verification have no steps in common: each process has its own share of the files.

All communication is that of jax's coordination service. `jax.distributed.initialize` returns when
all processes have registered; then they compare what they run through its key-value store.

Two threads watch while a job runs. One takes part in jax's roll call of live processes, which
returns without a process whose heartbeats have stopped; the other waits for the last words of a
process that fails. Either ends this process too, with a sentence. jax itself ends a process that
cannot register or has lost the service, by SIGABRT, whose handler says why in a sentence.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import io
import ipaddress
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from qwen_jax.config import ConfigError
from qwen_jax.distributed import verbosity
from qwen_jax.files import reading

T = TypeVar("T")

PREEMPTED = 75
"""Exit code after SIGTERM: the same command goes on where it can (EX_TEMPFAIL)."""
LOST = 69
"""Exit code if another process is gone (EX_UNAVAILABLE)."""

_FACTS = "qwen_jax/facts/"
_FAILED = "qwen_jax/failed"
_LEFT = "qwen_jax/left/"
_SHARED = "qwen_jax/shared/"
_PART_BYTES = 1 << 20  # of a message of the key-value store
_FOREVER_MS = 10**9
_ROLL_CALL_S = 0.5  # between two
_LINGER_S = 1.5  # that process 0 and its service outlive bad news
_GRACE_S = 4  # over the heartbeat, until the dead process is named
_DIFFERENCES = 20  # that are named
_VALUE_CHARS = 60  # that are shown of a value
_ADVICE = "start the same command on all hosts"


class Preempted(Exception):
    """All processes stop here, after the same step: one of them was told to by SIGTERM."""


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


@dataclasses.dataclass(slots=True, eq=False)
class _Job:
    """A job that this process is part of.

    Attributes:
        heartbeat: seconds after which a silent process is dead.
        timeout: seconds to wait for the others to register.
        fault: why this process cannot take part, which it tells the others.
        state: jax's, with the client of its coordination service; None before all have registered.
        steps: calls of `check_preemption`.
        shared: calls of `broadcast_json` and `all_gather_json`.
        is_over: whether somebody has the last word already.
    """

    place: Place
    heartbeat: int
    timeout: int
    fault: str | None = None
    state: Any = None
    steps: int = 0
    shared: int = 0
    is_over: bool = False
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @property
    def client(self) -> Any:
        """Of jax's coordination service; None before all have registered."""
        return self.state and self.state.client

    def claim(self) -> bool:
        """Whether the caller has the last word."""
        with self.lock:
            mine, self.is_over = not self.is_over, True
        return mine


_job: _Job | None = None


def is_first() -> bool:
    """Whether this process reads and writes: process 0, or the only one."""
    return _job is None or _job.place.process == 0


def count() -> int:
    """Processes of the job; 1 for one that is alone."""
    return 1 if _job is None else _job.place.count


def is_alone() -> bool:
    """Whether there is no other process."""
    return _job is None


def find(
    coordinator: str | None, count: int | None, process: int | None, timeout: int
) -> Place | None:
    """Where this process is in a job, as given, else as jax finds it in the environment.

    jax knows Cloud TPUs, GKE, Kubernetes with its package, Slurm and Open MPI; it and this read
    JAX_COORDINATOR_ADDRESS, JAX_COORDINATOR_PORT and JAX_COORDINATOR_BIND_ADDRESS.

    Returns:
        None for a process that is alone.

    Raises:
        ConfigError: if it is not said who is who.
    """
    if count is not None and count < 1:
        raise ConfigError(f"--num-processes {count} must be at least 1")
    given = coordinator is not None or count is not None or process is not None
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    detected = count != 1 and None in (coordinator, count, process)
    if detected:
        coordinator, count, process = _detected(coordinator, count, process, timeout)
    if count == 1:
        if process:
            raise ConfigError(f"--process-id {process} must be 0 of --num-processes 1")
        return None
    if count is None and not given:
        return None
    named = {"--coordinator": coordinator, "--num-processes": count, "--process-id": process}
    missing = [flag for flag, value in named.items() if value is None]
    if coordinator is None or count is None or process is None:
        raise ConfigError(
            f"{' and '.join(missing)} missing: several processes need all of {', '.join(named)}, "
            "where no scheduler that jax knows says them"
        )
    if not 0 <= process < count:
        raise ConfigError(f"--process-id {process} must be from 0 to {count - 1}")
    split_address(coordinator)
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator)
    return Place(
        coordinator=coordinator, bind=bind, process=process, count=count, detected=detected
    )


def start(
    place: Place | None,
    facts: Callable[[], Mapping[str, str]],
    *,
    heartbeat: int,
    timeout: int,
    devices: bool = True,
) -> None:
    """Makes this process part of a job; does nothing for one that is alone.

    Before anything uses a device of jax.

    Args:
        facts: says, by name, what must be the same in all processes.
        heartbeat: seconds after which a silent process is dead.
        timeout: seconds to wait for the others.
        devices: False where each process works with its own CPU and jax is to know of no
            other process. SIGTERM is then as Ctrl-C.

    Raises:
        ConfigError: if a process is missing, there twice, or differs.
    """
    global _job
    for flag, value in (("--heartbeat", heartbeat), ("--init-timeout", timeout)):
        if value < 1:
            raise ConfigError(f"{flag} {value} must be at least 1 second")
    if place is None:
        return
    _job = _Job(place=place, heartbeat=heartbeat, timeout=timeout)
    _redirect()
    if verbosity.get() is not verbosity.Level.NONE:
        write_stderr(f"process {place.process} of {place.count}, {_where(place)}")
    try:
        found = dict(facts())
    except Exception as error:
        _job.fault, _job.timeout = str(error), min(timeout, _GRACE_S)
        _connect(_job, devices)
        _compare(_job, {})
        raise
    _connect(_job, devices)
    threading.Thread(target=_call_roll, args=(_job,), daemon=True).start()
    _compare(_job, found)
    threading.Thread(target=_hear_last_words, args=(_job,), daemon=True).start()


def broadcast_json(make: Callable[[], T]) -> T:
    """What process 0 makes, on all of them; it must survive JSON.

    The last one to read it has the coordination service forget it.
    """
    if _job is None:
        return make()
    key, _job.shared = f"{_SHARED}{_job.shared}", _job.shared + 1
    client = _job.client
    if _job.place.process == 0:
        made = make()
        data = json.dumps(made).encode()
        parts = range(0, len(data), _PART_BYTES)
        for number, begin in enumerate(parts):
            client.key_value_set_bytes(f"{key}/{number}", data[begin : begin + _PART_BYTES])
        client.key_value_set(f"{key}/parts", str(len(parts)))
        return made
    count = int(client.blocking_key_value_get(f"{key}/parts", _FOREVER_MS))
    read = client.blocking_key_value_get_bytes
    data = b"".join(read(f"{key}/{number}", _FOREVER_MS) for number in range(count))
    if client.key_value_increment(f"{key}/read", 1) == _job.place.count - 1:
        client.key_value_delete(key)
    return json.loads(data)


def all_gather_json(value: T) -> list[T]:
    """What each process gives, in the order of their numbers, on all; it must survive JSON."""
    if _job is None:
        return [value]
    key, _job.shared = f"{_SHARED}{_job.shared}", _job.shared + 1
    _job.client.key_value_set(f"{key}/{_job.place.process}", json.dumps(value))
    read = _job.client.blocking_key_value_get
    return [json.loads(read(f"{key}/{number}", _FOREVER_MS)) for number in range(count())]


def await_all() -> None:
    """Returns when every process has come here."""
    all_gather_json(None)


def local_share(items: Sequence[T]) -> Sequence[T]:
    """Those of some items that this process works on, if each works on its own."""
    return items if _job is None else items[_job.place.process :: _job.place.count]


def check_preemption() -> None:
    """Called by all processes between two steps, after the same ones.

    Raises:
        Preempted: in all of them after the same step, if one got SIGTERM.
    """
    if _job is None:
        return
    from jax.experimental import multihost_utils

    _job.steps += 1
    if multihost_utils.reached_preemption_sync_point(_job.steps):
        raise Preempted(f"stopped by SIGTERM, all {_job.place.count} processes alike")


def announce(text: str, code: int) -> None:
    """The last words of a process that fails: the others end too, and say them."""
    if _job is None or _job.client is None:
        return
    if not _job.claim():
        threading.Event().wait()  # another thread is ending this process
    words = {"process": _job.place.process, "text": text, "code": code}
    with contextlib.suppress(Exception):  # they may have ended
        _job.client.key_value_set(_FAILED, json.dumps(words))


def await_verdict() -> None:
    """Gives the watching threads the time to find out who died; returns if nobody has."""
    if _job is not None and _job.client is not None and not _job.is_over:
        time.sleep(_job.heartbeat + _GRACE_S)


def leave(code: int) -> int:
    """The exit code of a process that is alone; one of a job ends here.

    The interpreter would stop the watching threads inside C++, which aborts, and wait for what
    still runs on devices, which after a failure may be for ever.
    """
    if _job is None or _job.client is None:
        return code
    if code not in (0, PREEMPTED):
        if not _job.is_over:
            announce("it was interrupted" if code == 130 else f"exit code {code}", code)
        _exit(_job, code)
    client, count = _job.client, _job.place.count
    try:
        client.wait_at_barrier("qwen_jax/end", _FOREVER_MS)
    except RuntimeError:
        await_verdict()
        raise
    if not _job.claim():
        threading.Event().wait()
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    if _job.place.process == 0:
        # The service goes last: a client that loses it is ended by jax.
        for process in range(1, count):
            with contextlib.suppress(Exception):
                client.blocking_key_value_get(f"{_LEFT}{process}", 1000 * _job.heartbeat)
        time.sleep(0.2)
    else:
        client.key_value_set(f"{_LEFT}{_job.place.process}", "yes")
    _job.state.shutdown()
    sys.stdout.flush()
    os._exit(code)


def split_address(address: str) -> tuple[str, int]:
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


def differences(facts: Mapping[int, Mapping[str, str]]) -> str:
    """What differs between processes: each name, its values and who has them; "" for nothing."""
    found = []
    for name in {name: None for each in facts.values() for name in each}:
        values: dict[str, list[int]] = {}
        for process, each in sorted(facts.items()):
            values.setdefault(each.get(name, "missing"), []).append(process)
        if len(values) > 1:
            said = [f"{_shown(value)} on {_processes(have)}" for value, have in values.items()]
            found.append(f"{reading.printable(name, _VALUE_CHARS)} is {' and '.join(said)}")
    return "; ".join(found[:_DIFFERENCES])


def _processes(numbers: Sequence[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _shown(value: str) -> str:
    if len(value) <= _VALUE_CHARS:
        return reading.printable(value)
    digest = hashlib.sha256(value.encode()).hexdigest()[:12]
    return f"{reading.printable(value[:_VALUE_CHARS])}... (SHA-256 {digest})"


def _detected(coordinator, count, process, timeout: int):
    """What jax finds in the environment for what is None."""
    # No public function says it before jax.distributed.initialize acts on it.
    from jax._src.clusters import ClusterEnv

    known = ClusterEnv._cluster_types
    found = None
    try:
        with warnings.catch_warnings(action="ignore"):  # of pods without the package kubernetes
            found = next(
                (e for e in known if not e.opt_in_only_method and e.is_env_present()), None
            )
        if found is None:
            return coordinator, count, process
        if count is None:
            # An interactive step has the number of tasks of its job in SLURM_NTASKS.
            step = os.environ.get("SLURM_STEP_NUM_TASKS") if found.name == "slurm" else None
            count = found.get_process_count() if step is None else int(step)
        if count == 1:
            return coordinator, count, process
        process = found.get_process_id() if process is None else process
        if coordinator is None:
            coordinator = found.get_coordinator_address(
                timeout_secs=timeout,
                override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
            )
    except Exception as error:
        raise ConfigError(
            f"jax finds {found.name if found else 'a scheduler'} but not who is who ({error}): "
            "give --coordinator, --num-processes and --process-id, or --num-processes 1"
        ) from None
    return coordinator, count, process


def _where(place: Place) -> str:
    if place.process:
        return f"coordinator {place.coordinator}"
    return f"the coordinator; it listens on {place.bind}"


def _redirect() -> None:
    """Answers to stdout from process 0 alone; apart from ours, what C++ writes there and to stderr.

    That is kept in memory for `say_native`.
    """
    global _stderr, _native
    sys.stdout.flush()
    sys.stderr.flush()
    kept, _stderr = os.dup(1), os.dup(2)
    if hasattr(os, "memfd_create"):
        _native = os.memfd_create("stderr")
        fcntl.fcntl(_native, fcntl.F_SETFL, os.O_APPEND)
        os.dup2(_native, 2)
    os.dup2(2, 1)
    target = kept if is_first() else os.open(os.devnull, os.O_WRONLY)
    sys.stdout = io.TextIOWrapper(
        os.fdopen(target, "wb"), errors="replace", line_buffering=os.isatty(target)
    )
    sys.stderr = io.TextIOWrapper(
        os.fdopen(_stderr, "wb", buffering=0), errors="replace", write_through=True
    )


_stderr = 2  # where this process says something
_native: int | None = None  # a file in memory of what C++ has written to stderr
_NATIVE_BYTES = 1 << 20  # over which it is emptied


def _native_words() -> bytes:
    return b"" if _native is None else os.pread(_native, 2 * _NATIVE_BYTES, 0)


def say_native() -> None:
    """Says what C++ has written to stderr, where it was kept: for failures that nobody explains."""
    os.write(_stderr, _native_words())


def _release_native() -> None:
    """Has C++ write to stderr from here on."""
    global _native
    say_native()
    os.dup2(_stderr, 2)
    os.dup2(_stderr, 1)
    _native = None


def _connect(job: _Job, devices: bool) -> None:
    """Registers this process with jax's coordination service, which process 0 starts."""
    import jax
    from jax._src import distributed

    place = job.place
    if place.process == 0:
        _check_free(place.bind)
        _bound_registration(job.timeout)
    # Else jax ends all processes when one is gone, without a word that a user can read.
    jax.config.update("jax_enable_recoverability", True)
    if _is_loopback(place.coordinator):
        _collectives_on_loopback()
    _on_abort(job)
    pass_proxies(split_address(place.coordinator)[0])
    state = distributed.global_state if devices else distributed.State()
    if not devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_preemption_service", False)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    initialize = jax.distributed.initialize if devices else state.initialize
    # Python acts on Ctrl-C between two of its own steps, and this one may wait long.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    initialize(
        place.coordinator,
        place.count,
        place.process,
        cluster_detection_method=None if place.detected else "deactivate",
        initialization_timeout=job.timeout,
        heartbeat_timeout_seconds=job.heartbeat,
        coordinator_bind_address=place.bind,
    )
    signal.signal(signal.SIGINT, previous)
    job.state = state
    if verbosity.get() is verbosity.Level.DETAIL:
        _release_native()


def _compare(job: _Job, facts: Mapping[str, str]) -> None:
    """Returns when all processes have told their facts, which agree.

    Raises:
        ConfigError: if another process has this one's number, has failed, or differs.
    """
    place, client = job.place, job.client
    own = {"--num-processes": str(place.count), **facts}
    try:
        client.key_value_set(f"{_FACTS}{place.process}", json.dumps([job.fault, own]))
    except RuntimeError as error:
        if "ALREADY_EXISTS" in str(error):
            raise ConfigError(_twice(place)) from None
        raise
    if job.fault is not None:
        return

    def read(number: int) -> tuple[str | None, dict[str, str]]:
        return json.loads(client.blocking_key_value_get(f"{_FACTS}{number}", _FOREVER_MS))

    _, first = read(0)
    told = {}
    for number in range(min(place.count, int(first["--num-processes"]))):  # who can register
        fault, told[number] = read(number)
        if fault is not None:
            raise ConfigError(f"process {number} ended: {reading.printable(fault, 2000)}")
    if found := differences(told):
        raise ConfigError(f"the processes differ: {found}; {_ADVICE}")


def _twice(place: Place) -> str:
    return (
        f"another process says it is process {place.process} of {place.count} too: give each a "
        "--process-id of its own"
    )


def _check_free(address: str) -> None:
    """Checks that process 0 can listen on an address.

    gRPC shares a port with another process that does, and dies where it cannot have the address.

    Raises:
        ConfigError: if it cannot.
    """
    host, port = split_address(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen on {address} ({error.strerror or error}): another process 0 "
            "may be there already, or --coordinator names another host or a port in use"
        ) from None


def _bound_registration(timeout: int) -> None:
    """Has jax's service name the processes that have not registered in time."""
    from jax._src.lib import _jax

    make = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = functools.partial(make, cluster_register_timeout=timeout)


def pass_proxies(host: str) -> None:
    """Has gRPC connect to a host directly, whatever proxies the environment names for HTTP.

    It tunnels through `grpc_proxy`, `https_proxy` and `http_proxy`, which lead out of a cluster,
    not to its hosts. Where `no_grpc_proxy` is set, gRPC does not read `no_proxy`.
    """
    import jax

    if any(name.lower().endswith("_proxy") for name in os.environ):
        jax.config.update("jax_check_proxy_envs", False)  # a warning that they may make it hang
        for name in {"no_proxy"} | ({"no_grpc_proxy"} & os.environ.keys()):
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), host)))


def _is_loopback(address: str) -> bool:
    """Whether an address says so itself: all processes must find the same."""
    host, _ = split_address(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _collectives_on_loopback() -> None:
    """CPUs listen for each other where the host's name leads, unless told otherwise."""
    from jax._src.lib import _jax

    make = _jax.make_gloo_tcp_collectives
    _jax.make_gloo_tcp_collectives = functools.partial(make, hostname="127.0.0.1")


def _on_abort(job: _Job) -> None:
    """Has a sentence said and a code of ours returned when jax ends this process.

    jax takes a callback for that, which it cannot call (std::bad_cast, up to jax 0.12).
    """

    def say(_: int) -> None:
        words = _native_words().decode(errors="replace")
        text, code = _lost(job.place), LOST
        if job.client is None:
            if verbosity.get() is verbosity.Level.DETAIL:
                say_native()
            text, code = job.fault or _unregistered(job, words), 2
        elif not job.place.process or "JAX distributed service" not in words:
            say_native()
        write_stderr(f"error: {text}")
        _exit(job, code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say)
    _kept.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


_kept: list[Any] = []  # of C, which does not keep them


def _unregistered(job: _Job, words: str) -> str:
    """Why this process could not register with jax's coordination service.

    Args:
        words: what C++ has written to stderr.
    """
    place = job.place
    words = words[words.rfind("Terminating process") :]
    if "newer incarnation" in words or "more recent barrier call" in words:
        return _twice(place)
    if "Unexpected task" in words:
        return (
            f"--num-processes is {place.count} on process {place.process} and less than "
            f"{place.process + 1} on process 0: {_ADVICE}"
        )
    found = re.search(r"(\d+)/(\d+)\.\n.*task names:\n((?:\d+\n)+)", words)
    if found is not None:
        missing = sorted(map(int, found[3].split()))
        there, count = int(found[1]), int(found[2])
        more = f" and {count - there - len(missing)} more" * (len(missing) < count - there)
        return (
            f"{_processes(missing)}{more} of {count} did not come to {place.coordinator} in time "
            f"(--init-timeout): {_ADVICE}"
        )
    fault = "who listens there started no job: process 0 names the missing processes"
    try:
        socket.create_connection(split_address(place.coordinator), timeout=1).close()
    except OSError as error:
        fault = reading.reason(error)
    return (
        f"process {place.process} of {place.count} did not find process 0 at {place.coordinator} "
        f"within {job.timeout} s ({fault}): {_ADVICE}"
    )


def _lost(place: Place) -> str:
    """Why jax may have ended this process."""
    service = f"process 0, the coordinator at {place.coordinator},"
    if place.process:
        try:
            socket.create_connection(split_address(place.coordinator), timeout=1).close()
        except OSError:
            return f"{service} is gone: process {place.process} of {place.count} ends too"
        return f"{service} does not answer: process {place.process} of {place.count} ends too"
    return "jax's coordination service ended this process, as it says above"


def _call_roll(job: _Job) -> None:
    """Ends this process when another one is no longer among the living."""
    everybody = list(range(job.place.count))
    while not job.is_over:
        try:
            living = job.client.get_live_nodes(everybody)
        except Exception:  # the end of the job, or of the service, which jax acts on
            return
        gone = [process for process in everybody if process not in living]
        dead = [process for process in gone if not _has_left(job, process)]
        if dead and job.claim():
            write_stderr(
                f"error: {_processes(dead)} of {job.place.count} did not answer for "
                f"{job.heartbeat} s: killed, stopped or cut off; all end"
            )
            _exit(job, LOST)
        if _native is not None and os.fstat(_native).st_size > _NATIVE_BYTES:
            os.ftruncate(_native, 0)
        time.sleep(_ROLL_CALL_S)


def _has_left(job: _Job, process: int) -> bool:
    """Whether a process has ended in order."""
    try:
        return job.client.key_value_try_get(f"{_LEFT}{process}") != ""
    except Exception:  # there is no such key
        return False


def _hear_last_words(job: _Job) -> None:
    """Ends this process when another one has failed."""
    try:
        words = json.loads(job.client.blocking_key_value_get(_FAILED, _FOREVER_MS))
    except Exception:  # as in `_call_roll`
        return
    if words["process"] != job.place.process and job.claim():
        write_stderr(
            f"error: process {words['process']} of {job.place.count} ended: {words['text']}"
        )
        _exit(job, words["code"])


def _exit(job: _Job, code: int) -> None:
    """Ends this process at once; the coordination service a little after the others."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if job.place.process == 0:
        time.sleep(_LINGER_S)
    os._exit(code)


def write_stderr(text: str) -> None:
    """Write a line to the standard error that the process began with."""
    os.write(_stderr, f"{reading.shown(text)}\n".encode(errors="replace"))
