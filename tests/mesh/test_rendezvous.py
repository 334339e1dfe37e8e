"""Processes that look for each other: who is missing, who is there twice, what differs."""

import contextlib
import socket
import threading

import pytest
from support.jobs import free_port

from qwen_jax.config import ConfigError
from qwen_jax.distributed import rendezvous
from qwen_jax.distributed.rendezvous import Place

SECONDS = 20.0


def place(port, process, count=2):
    address = f"127.0.0.1:{port}"
    return Place(coordinator=address, bind=address, process=process, count=count)


def meet(*each, timeout=SECONDS):
    """What each of some processes is told, in the order of their places; "" where they met."""
    told = [""] * len(each)

    def come(number, where, facts):
        try:
            rendezvous.meet(where, facts, timeout)
        except ConfigError as error:
            told[number] = str(error)

    threads = [
        threading.Thread(target=come, args=(number, *arguments))
        for number, arguments in enumerate(each)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_processes_that_agree_meet_in_any_order():
    port = free_port()
    facts = {"--dtype": "f32", "--prompt": "é" * 10_000}
    assert meet(*((place(port, process, 4), facts) for process in (2, 1, 0, 3))) == [""] * 4


def test_what_differs_is_named_with_both_values_in_every_process():
    port = free_port()
    same = {"jax": "0.10.2", "--dtype": "f32"}
    told = meet(
        (place(port, 0, 3), same),
        (place(port, 1, 3), same | {"--dtype": "bf16"}),
        (place(port, 2, 3), {"jax": "0.10.2"}),
    )
    assert (
        told
        == [
            "the processes differ: --dtype is f32 on process 0 and bf16 on process 1 and missing "
            "on process 2; start the same command on all hosts"
        ]
        * 3
    )


def test_a_missing_process_is_named():
    port = free_port()
    told = meet((place(port, 0, 4), {}), (place(port, 2, 4), {}), timeout=2.0)
    assert (
        told
        == [
            f"processes 1, 3 of 4 did not come to 127.0.0.1:{port} within 2 s: "
            "start the same command on all hosts"
        ]
        * 2
    )


def test_without_a_coordinator_the_others_say_where_they_looked():
    port = free_port()
    (told,) = meet((place(port, 1), {}), timeout=0.5)
    assert told == (
        f"process 1 of 2 did not find process 0 at 127.0.0.1:{port} within 0.5 s "
        "(Connection refused): start the same command on all hosts"
    )


def test_two_processes_of_one_number_are_refused():
    port = free_port()
    told = meet(*((place(port, process, 3), {}) for process in (0, 1, 1)))
    assert (
        told
        == [
            "two processes, on 127.0.0.1 and 127.0.0.1, say they are process 1 of 3: give each a "
            "--process-id of its own"
        ]
        * 3
    )


def test_a_second_process_0_is_refused_and_the_first_goes_on():
    port = free_port()
    first, second = [], []
    waiting = threading.Thread(
        target=lambda: first.extend(meet((place(port, 0), {}), (place(port, 1), {})))
    )
    with rendezvous._listening(f"127.0.0.1:{port}"):
        second = meet((place(port, 0), {}))
    waiting.start()
    waiting.join()
    assert first == ["", ""]
    assert second[0].startswith(f"process 0 cannot listen on 127.0.0.1:{port} (Address already")


def test_what_is_no_process_of_the_job_is_let_go():
    port = free_port()
    told = []
    waiting = threading.Thread(target=lambda: told.extend(meet((place(port, 0), {}))))
    waiting.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[" * 100_000 + b"\n", b'{"process": "1"}\n', b""):
        with _connected(port) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(1000):
                pass
    assert meet((place(port, 1), {})) == [""]
    waiting.join()
    assert told == [""]


@pytest.mark.parametrize(
    "message",
    [
        b'{"facts": 5}',
        b'{"process": 1, "facts": 5}',
        b'{"process": 1, "facts": {"--dtype": 5}}',
        b'{"process": 1, "facts": ["--dtype"]}',
        b'{"process": 1}',
        b'{"process": true, "facts": {}}',
        b'{"process": 1.0, "facts": {}}',
        b'{"process": NaN, "facts": {}}',
        b'{"process": 1, "process": 1, "facts": {}}',
        b'{"process": ' + b"9" * 5000 + b', "facts": {}}',
        b'{"process": 1, "reason": {}}',
        b'{"process": 1, "facts": {}, "refused": null}',
        b"5",
        b"null",
        b"\xff",
        b"x" * (3 << 20),
    ],
    ids=lambda message: str(message[:40]),
)
def test_a_message_of_other_types_is_let_go(message):
    port = free_port()
    notes, told = [], []

    def wait():
        rendezvous.meet(place(port, 0), {"--dtype": "f32"}, SECONDS, note=notes.append)
        told.append("met")

    waiting = threading.Thread(target=wait)
    waiting.start()
    with _connected(port) as stranger, contextlib.suppress(OSError):
        stranger.sendall(message + b"\n")
        while stranger.recv(1000):
            pass
    assert meet((place(port, 1), {"--dtype": "f32"})) == [""]
    waiting.join()
    assert told == ["met"]
    (note,) = notes
    assert note.startswith("a connection from 127.0.0.1 is of no process of this job (")
    assert note.isprintable()


def test_silent_and_slow_connections_keep_nobody_waiting():
    """One after another would take longer than the processes wait for each other."""
    port = free_port()
    first = []
    waiting = threading.Thread(target=lambda: first.extend(meet((place(port, 0), {}))))
    waiting.start()
    stop = threading.Event()

    def drip(peer):
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                peer.sendall(b"[")

    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(_connected(port)) for _ in range(200)]
        dripping = threading.Thread(target=drip, args=(strangers[-1],))
        dripping.start()
        assert meet((place(port, 1), {})) == [""]
        waiting.join()
        assert first == [""]
        stop.set()
        dripping.join()


@pytest.mark.parametrize("answer", [b'{"refused": 5}\n', b"{}\n", b"HTTP/1.1 400\n", b"\xff", b"["])
def test_what_is_no_process_0_is_named_in_time(answer, monkeypatch):
    monkeypatch.setattr(rendezvous, "_LINE_S", 0.2)
    with rendezvous._listening(f"127.0.0.1:{free_port()}") as server:
        stop = threading.Event()

        def serve():
            server.settimeout(0.1)
            while not stop.is_set():
                with contextlib.suppress(OSError), server.accept()[0] as peer:
                    peer.sendall(answer)
                    stop.wait(0.05)

        serving = threading.Thread(target=serve)
        serving.start()
        port = server.getsockname()[1]
        (told,) = meet((place(port, 1), {}), timeout=0.6)
        stop.set()
        serving.join()
    assert told.startswith(f"process 1 of 2 did not find process 0 at 127.0.0.1:{port} within")
    assert told.isprintable()


def test_what_peers_say_is_printed_with_escapes():
    port = free_port()
    told = []
    waiting = threading.Thread(target=lambda: told.extend(meet((place(port, 0, 3), {}))))
    waiting.start()
    rendezvous.withdraw(place(port, 2, 3), "no\x1b[2J\nfile", SECONDS)
    waiting.join()
    assert told == ["process 2 ended: no\\x1b[2J\\nfile"]
    found = rendezvous.differences({0: {"a\n": "\x1b"}, 1: {"a\n": "x" * 100}})
    assert found.isprintable()
    assert found.startswith("a\\n is \\x1b on process 0 and xxx")


def test_one_that_leaves_before_all_are_there_may_come_again():
    port = free_port()
    told = []
    waiting = threading.Thread(target=lambda: told.extend(meet((place(port, 0, 3), {}))))
    waiting.start()
    with _connected(port) as early:
        early.sendall(b'{"process": 1, "facts": {}}\n')
    assert meet(*((place(port, process, 3), {}) for process in (1, 2))) == ["", ""]
    waiting.join()
    assert told == [""]


def test_the_reason_of_one_that_does_not_come_is_told_to_all():
    port = free_port()
    told = []
    waiting = threading.Thread(target=lambda: told.extend(meet((place(port, 0, 3), {}))))
    waiting.start()
    rendezvous.withdraw(place(port, 2, 3), "config.json is missing", SECONDS)
    waiting.join()
    assert told == ["process 2 ended: config.json is missing"]


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "10.0.0.1:", ":80", "host:0", "host:70000", "h:" + "9" * 5000, "h:²"]
)
def test_an_address_needs_host_and_port(address):
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        rendezvous.split(address)


def _connected(port):
    """A connection to process 0, which may not be there yet."""
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        except ConnectionRefusedError:
            pass
