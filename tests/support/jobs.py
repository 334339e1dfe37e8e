"""Jobs of several processes on loopback, whose processes can be stopped and killed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

VERB = "import sys; from qwen_jax.cli import main; sys.exit(main())"
ROOT = Path(__file__).parents[2]
# A job without a model: what is watched does not depend on what is computed.
IDLE = """
import sys, time
from qwen_jax.distributed import multihost as hosts
from qwen_jax.cli import flags, main, on_hosts
import qwen_jax.cli.generate as verb

def idle(model, **flags):
    print(hosts.broadcast_json(lambda: "up"), file=sys.stderr, flush=True)
    while True:
        hosts.check_preemption()
        time.sleep(0.05)

idle.__signature__ = __import__("inspect").Signature(
    [__import__("inspect").Parameter("model", 3, annotation=flags.ModelArgument)]
)
verb.generate = on_hosts.expand_on_hosts(idle)
sys.exit(main(["generate", *sys.argv[1:]]))
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Job:
    """Processes that run one command line, each with its number.

    Args:
        count: processes in all.
        own: arguments of single processes, by number, after the others.
        numbers: of the processes that are started; all of them.
        code: what they run.
        port: of the coordinator; a free one.
    """

    def __init__(self, count, folder, *arguments, own=None, numbers=None, code=VERB, port=None):
        self.port = free_port() if port is None else port
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.started = time.monotonic()
        self.processes = []
        for index, number in enumerate(range(count) if numbers is None else numbers):
            place = ["--coordinator", f"127.0.0.1:{self.port}", "--num-processes", str(count)]
            with (
                (folder / f"out.{index}").open("wb") as out,
                (folder / f"err.{index}").open("wb") as err,
            ):
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", code]
                        + [*map(str, arguments), *place, "--process-id", str(number)]
                        + [str(each) for each in (own or {}).get(index, ())],
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        env=os.environ
                        | {
                            "PYTHONPATH": str(ROOT),
                            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                        },
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def out(self, index: int) -> str:
        return (self._folder / f"out.{index}").read_text()

    def err(self, index: int) -> str:
        return (self._folder / f"err.{index}").read_text()

    def errors(self) -> list[list[str]]:
        """The lines of each process that say how it ended."""
        lines = [self.err(index).splitlines() for index in range(len(self.processes))]
        return [[line for line in each if line.startswith("error: ")] for each in lines]

    def codes(self, *indices: int, seconds: float = 300) -> list[int]:
        """Exit codes of some processes, or of all; waits for them."""
        chosen = indices or range(len(self.processes))
        return [self.processes[index].wait(timeout=seconds) for index in chosen]

    def wait_for(self, text: str, *indices: int, seconds: float = 300) -> None:
        """Waits until some processes have said something."""
        until = time.monotonic() + seconds
        for index in indices or range(len(self.processes)):
            while text not in self.out(index) + self.err(index):
                code = self.processes[index].poll()
                assert code is None, (index, code, self.err(index))
                assert time.monotonic() < until, self.err(index)
                time.sleep(0.1)

    def send(self, index: int, number: signal.Signals) -> None:
        self.processes[index].send_signal(number)

    def listening(self) -> set[str]:
        """Addresses on which the processes accept connections."""
        own, found = set(), set()
        for process in self.processes:
            # It ended meanwhile; what was not waited for is shown to root alone.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                for entry in Path(f"/proc/{process.pid}/fd").iterdir():
                    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                        own.add(os.readlink(entry))
        for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                    found.add(_address(fields[1].split(":")[0], family))
        return found


def _address(words: str, family: int) -> str:
    """An address as the kernel writes it: words of 32 bits in the order of this machine."""
    data = b"".join(
        int(words[start : start + 8], 16).to_bytes(4, sys.byteorder)
        for start in range(0, len(words), 8)
    )
    return socket.inet_ntop(family, data)
