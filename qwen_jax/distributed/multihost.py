"""Multi-host jobs: several processes, one or more per host, that run one command in lock-step.

Every process runs the same steps on the same inputs, in the same order. Process 0 alone reads
files that may exist on its host only, and writes answers; it broadcasts what it read, and the
other processes print nothing to stdout. Conversion and verification share no steps: each process
works on its own share of the files.

All communication goes through JAX's coordination service. `jax.distributed.initialize` returns
when all processes have registered; then they compare their settings through its key-value store.

Two threads watch while a job runs. One polls JAX for the live processes, among which a process
whose heartbeats have stopped is missing; the other waits for the failure message of another
process. Either ends this process too, with one line on stderr. JAX itself ends a process that
cannot register or has lost the service, by SIGABRT, whose handler prints the reason.
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
"""Exit code after SIGTERM (EX_TEMPFAIL): run again, the same command resumes where it can."""
LOST = 69
"""Exit code if another process was lost (EX_UNAVAILABLE)."""

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
    """Raised in all processes after the same step, if one of them got SIGTERM."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Place of a process in its job.

    Attributes:
        coordinator: HOST:PORT of the coordination service, which process 0 runs.
        bind: HOST:PORT that the service listens on.
        process: index of this process, from 0.
        count: number of processes.
        detected: whether JAX found part of this in the environment, where it then also finds
            the devices of this process.
    """

    coordinator: str
    bind: str
    process: int
    count: int
    detected: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class _Job:
    """Job that this process is part of.

    Attributes:
        heartbeat: heartbeat timeout in seconds.
        timeout: seconds to wait for all processes to register.
        fault: reason why this process cannot take part, told to the others; None if it can.
        state: JAX's distributed state, with the client of its coordination service; None before
            all processes have registered.
        steps: number of calls of `check_preemption`.
        shared: number of calls of `broadcast_json` and `all_gather_json`.
        is_over: whether a thread has claimed the end of this process.
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
        """Client of JAX's coordination service; None before all processes have registered."""
        return self.state and self.state.client

    def claim(self) -> bool:
        """Claims the end of this process; returns True to the first caller only."""
        with self.lock:
            mine, self.is_over = not self.is_over, True
        return mine


_job: _Job | None = None


def is_first() -> bool:
    """Returns True if this process reads and writes files: process 0, or the only one."""
    return _job is None or _job.place.process == 0


def count() -> int:
    """Returns the number of processes of the job; 1 without a job."""
    return 1 if _job is None else _job.place.count


def is_alone() -> bool:
    """Returns True if this process is not part of a job."""
    return _job is None


def find(
    coordinator: str | None, count: int | None, process: int | None, timeout: int
) -> Place | None:
    """Finds the place of this process in a job: as given, else as JAX finds it in the environment.

    JAX detects Cloud TPUs, GKE, Kubernetes (with the package `kubernetes`), Slurm and Open MPI.
    JAX_COORDINATOR_ADDRESS, JAX_COORDINATOR_PORT and JAX_COORDINATOR_BIND_ADDRESS are read too.

    Args:
        coordinator: HOST:PORT of the coordination service; None to detect it.
        count: number of processes; None to detect it.
        process: index of this process; None to detect it.
        timeout: seconds to look for the coordinator's address.

    Returns:
        The place, or None for a process that is not part of a job.

    Raises:
        ConfigError: if the values are inconsistent, or some are neither given nor found.
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
    """Joins a job, and compares settings with its other processes; does nothing without a place.

    Must be called before anything uses a JAX device.

    Args:
        place: place in the job; None for a process that is not part of one.
        facts: returns the settings, by name, that must be the same in all processes.
        heartbeat: heartbeat timeout in seconds.
        timeout: seconds to wait for all processes to register.
        devices: False if each process works on its own CPU, so that JAX sees no devices of
            other processes. SIGTERM then acts as Ctrl-C.

    Raises:
        ConfigError: if a process is missing, duplicate, or has other settings.
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
    """Calls `make` in process 0 and returns its result in all; the result must be JSON.

    The last process to read it deletes it from the coordination service.
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
    """Returns the values of all processes, in the order of their indices; they must be JSON."""
    if _job is None:
        return [value]
    key, _job.shared = f"{_SHARED}{_job.shared}", _job.shared + 1
    _job.client.key_value_set(f"{key}/{_job.place.process}", json.dumps(value))
    read = _job.client.blocking_key_value_get
    return [json.loads(read(f"{key}/{number}", _FOREVER_MS)) for number in range(count())]


def await_all() -> None:
    """Waits until every process has called this."""
    all_gather_json(None)


def local_share(items: Sequence[T]) -> Sequence[T]:
    """Returns the items that this process works on: every `count()`-th, from its index on."""
    return items if _job is None else items[_job.place.process :: _job.place.count]


def check_preemption() -> None:
    """Checks for SIGTERM; all processes must call this between the same steps.

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
    """Announces the failure of this process: the others print the text and exit with the code."""
    if _job is None or _job.client is None:
        return
    if not _job.claim():
        threading.Event().wait()  # another thread is ending this process
    words = {"process": _job.place.process, "text": text, "code": code}
    with contextlib.suppress(Exception):  # they may have ended
        _job.client.key_value_set(_FAILED, json.dumps(words))


def await_verdict() -> None:
    """Waits long enough for the watching threads to find a dead process, which ends this one."""
    if _job is not None and _job.client is not None and not _job.is_over:
        time.sleep(_job.heartbeat + _GRACE_S)


def leave(code: int) -> int:
    """Leaves the job and exits with `code`; without a job, returns `code`.

    The interpreter must not shut down normally: it would stop the watching threads inside C++,
    which aborts, and wait for work on devices, which after a failure may never end.
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
    """Splits HOST:PORT into host and port; an IPv6 address is in brackets.

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
    """Describes differing settings: each name, its values and their processes; "" for none.

    Args:
        facts: settings by name, for each process.
    """
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
    """Fills in arguments that are None with what JAX finds in the environment.

    Raises:
        ConfigError: if JAX detects a scheduler but fails to read its variables.
    """
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
    """Redirects standard streams: only process 0 writes to stdout, and C++ output is captured.

    Text that C++ code writes to stdout or stderr is kept in memory for `say_native`.
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
    """Prints the captured C++ output to stderr, for failures without an explanation."""
    os.write(_stderr, _native_words())


def _release_native() -> None:
    """Prints the captured C++ output, and lets C++ write to stderr from now on."""
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
    """Publishes the settings of this process and compares them with those of all others.

    Raises:
        ConfigError: if another process has this one's index, has failed, or differs.
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

    gRPC itself would share a port that another process uses, and abort on a foreign address.

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
    """Makes JAX's service report the processes that have not registered within the timeout."""
    from jax._src.lib import _jax

    make = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = functools.partial(make, cluster_register_timeout=timeout)


def pass_proxies(host: str) -> None:
    """Makes gRPC connect to a host directly, whatever HTTP proxies the environment names.

    gRPC would use `grpc_proxy`, `https_proxy` or `http_proxy`, which lead out of a cluster,
    not to its hosts. If `no_grpc_proxy` is set, gRPC ignores `no_proxy`.
    """
    import jax

    if any(name.lower().endswith("_proxy") for name in os.environ):
        jax.config.update("jax_check_proxy_envs", False)  # a warning that they may make it hang
        for name in {"no_proxy"} | ({"no_grpc_proxy"} & os.environ.keys()):
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), host)))


def _is_loopback(address: str) -> bool:
    """Returns True for localhost or a loopback IP; resolves no names, so all processes agree."""
    host, _ = split_address(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _collectives_on_loopback() -> None:
    """Makes CPU collectives listen on 127.0.0.1, instead of the address of the host's name."""
    from jax._src.lib import _jax

    make = _jax.make_gloo_tcp_collectives
    _jax.make_gloo_tcp_collectives = functools.partial(make, hostname="127.0.0.1")


def _on_abort(job: _Job) -> None:
    """Handles SIGABRT, by which JAX ends this process: prints the reason and exits with a code.

    JAX's own callback for this cannot be called from Python (std::bad_cast, up to JAX 0.12).
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
    """Explains why this process could not register with JAX's coordination service.

    Args:
        words: captured C++ output.
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
    """Explains why JAX may have ended this process."""
    service = f"process 0, the coordinator at {place.coordinator},"
    if place.process:
        try:
            socket.create_connection(split_address(place.coordinator), timeout=1).close()
        except OSError:
            return f"{service} is gone: process {place.process} of {place.count} ends too"
        return f"{service} does not answer: process {place.process} of {place.count} ends too"
    return "jax's coordination service ended this process, as it says above"


def _call_roll(job: _Job) -> None:
    """Polls for live processes; ends this one when another has died."""
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
    """Returns True if a process has ended normally."""
    try:
        return job.client.key_value_try_get(f"{_LEFT}{process}") != ""
    except Exception:  # there is no such key
        return False


def _hear_last_words(job: _Job) -> None:
    """Waits for the failure message of another process, and ends this one when it comes."""
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
    """Ends this process at once; process 0, which runs the service, 1.5 s later than the others."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if job.place.process == 0:
        time.sleep(_LINGER_S)
    os._exit(code)


def write_stderr(text: str) -> None:
    """Write a line to the standard error that the process began with."""
    os.write(_stderr, f"{reading.shown(text)}\n".encode(errors="replace"))
