"""Fetch a small model, convert and verify it, and ask it about a long text, with and without DCA.

The text is longer than the 8,192 tokens that the model was trained on. Ends with status 0 only if
the answer read with Dual Chunk Attention names the number that the text holds.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import demo_model
from demo_model import DemoError

DOCUMENT = Path(__file__).parents[1] / "docs" / "demo" / "journal.txt"
QUESTION = "What is the key of the lamp room?"
EXPECTED = "71906"


def qwen_jax(*arguments: object) -> str:
    """Runs a `qwen-jax` command, showing it and its output; returns the output.

    Raises:
        DemoError: if it fails.
    """
    command = ["qwen-jax", *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    script = Path(sys.executable).with_name(command[0])
    if not script.exists():
        raise DemoError(f"{script} is missing: run `make demo`, or pip install -e '.[demo]'")
    printed = b""
    with subprocess.Popen([script, *command[1:]], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            printed += piece
    if process.returncode:
        raise DemoError(f"{shlex.join(command[:2])} ended with status {process.returncode}")
    return printed.decode("utf-8", "replace")


def run(model: Path) -> bool:
    """Runs the demo; returns True if the answer with Dual Chunk Attention is right.

    Args:
        model: directory of the model; the converted checkpoint is put beside it if possible.
    """
    demo_model.fetch(model)
    checkpoint = demo_model.checkpoint_of(model)
    qwen_jax("convert", model, checkpoint, "--overwrite")
    qwen_jax("verify", checkpoint, "--full")
    ask = ("ask", checkpoint, "--file", DOCUMENT, "--max-new-tokens", 32, QUESTION)
    chunked = qwen_jax(*ask)
    plain = qwen_jax(*ask, "--dca", "off")
    print(f"\nThe journal says: the key of the lamp room is number {EXPECTED}.")
    print(f"  Dual Chunk Attention   {_verdict(chunked)}")
    print(f"  plain RoPE             {_verdict(plain)}")
    return EXPECTED in chunked


def _verdict(answer: str) -> str:
    verdict = "right" if EXPECTED in answer else "wrong"
    return f"{verdict}: {' '.join(answer.split())!r}"


if __name__ == "__main__":
    sys.exit(demo_model.demonstrate(run, __doc__))
