"""Read a long document once on two processes, lose one of them, go on, and ask what was read.

Two processes on this machine stand for two hosts. One is killed while they read, and one while
they answer a batch; the same commands go on where the job was. Ends with status 0 only if the
answers from the saved session name the number that the text holds, and the batch has one result
for each line.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import demo_model
from demo import DOCUMENT, EXPECTED, qwen_jax
from demo_model import DemoError

PROCESSES = 2
MESH = "seq=2"
SAVE_EVERY = 2048
QUESTIONS = (
    "What is the key of the lamp room?",
    "What is the title of the journal?",
    "What number is the key?",
)
ANSWER = ("--greedy", "--max-new-tokens", 24)
LOST = 69  # exit code of a process whose peer is gone


def job(*arguments: object, kill_when: Callable[[], bool] | None = None) -> None:
    """Runs a `qwen-jax` command as a multi-process job, and shows its output.

    Args:
        kill_when: process 1 is killed as soon as this returns True.

    Raises:
        DemoError: if a process ends in another way than it should.
    """
    place = ("--mesh", MESH, "--coordinator", f"127.0.0.1:{_free_port()}")
    command = [*map(str, (*arguments, *place)), "--num-processes", str(PROCESSES)]
    print(f"\n$ qwen-jax {shlex.join(command)} --process-id {{0,1}}", flush=True)
    script = Path(sys.executable).with_name("qwen-jax")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [script, *command, "--process-id", str(number)],
            env=environment,
            stderr=None if number == 0 else subprocess.DEVNULL,
        )
        for number in range(PROCESSES)
    ]
    try:
        if kill_when is None:
            expected = [0] * PROCESSES
        else:
            while not kill_when():
                if any(process.poll() is not None for process in processes):
                    raise DemoError("a process ended before one could be killed")
                time.sleep(0.05)
            print("\n$ kill -9 (process 1)", flush=True)
            processes[1].kill()
            expected = [LOST, -signal.SIGKILL]
        codes = [process.wait(timeout=600) for process in processes]
        if codes != expected:
            raise DemoError(f"the processes ended with {codes} instead of {expected}")
    finally:
        for process in processes:
            process.kill()


def run(model: Path) -> bool:
    """Runs the demo; returns True if the answers are right and the batch is complete.

    Args:
        model: directory of the model; the converted checkpoint is put beside it if possible.
    """
    demo_model.fetch(model)
    checkpoint = demo_model.checkpoint_of(model)
    qwen_jax("convert", model, checkpoint, "--resume")
    with tempfile.TemporaryDirectory(prefix="qwen-jax-pod-") as scratch:
        folder = Path(scratch)
        kept = folder / "kv"
        prompt = ("--file", DOCUMENT, "--save-every", SAVE_EVERY)
        read = ("prefill", checkpoint, *prompt, "--out", kept)
        job(*read, kill_when=lambda: _windows(kept) >= 2)
        job(*read)
        qwen_jax("kv", "inspect", kept)
        answers = [
            qwen_jax("ask", checkpoint, "--kv", kept, *ANSWER, question).strip()
            for question in QUESTIONS
        ]
        lines, results = folder / "requests.jsonl", folder / "results.jsonl"
        lines.write_text("".join(_line(number) for number in range(10)))
        batch = ("batch", checkpoint, lines, results, "--kv", kept, *ANSWER, "--max-seqs", 2)
        job(*batch, kill_when=lambda: _count(results) >= 3)
        job(*batch)
        found = _answers(results)
    print()
    for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        same = all(found.get(f"q{line}") == answer for line in range(number, 10, len(QUESTIONS)))
        print(f"  {question}  {' '.join(answer.split())!r}{'' if same else ' (not in the batch)'}")
        if not same:
            return False
    print(f"\nThe journal says: the key of the lamp room is number {EXPECTED}.")
    return EXPECTED in answers[0] and len(found) == 10


def _line(number: int) -> str:
    question = QUESTIONS[number % len(QUESTIONS)]
    request = {
        "custom_id": f"q{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": question}]},
    }
    return json.dumps(request) + "\n"


def _windows(kept: Path) -> int:
    """Returns the number of saved windows of the document."""
    try:
        return len(json.loads((kept / "session.json").read_text())["windows"])
    except FileNotFoundError:
        return 0


def _count(results: Path) -> int:
    return results.read_bytes().count(b"\n") if results.exists() else 0


def _answers(results: Path) -> dict[str, str]:
    """Returns answers by line; {} if a line has more than one result or an error."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    found = {
        row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"].strip()
        for row in rows
        if row["response"]["status_code"] == 200
    }
    return found if len(found) == len(rows) else {}


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


if __name__ == "__main__":
    sys.exit(demo_model.demonstrate(run, __doc__))
