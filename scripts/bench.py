"""Prefill, decode and peak memory against PyTorch, on the demo model.

Same weights, same dtype (float32), same number of threads. The two take turns in one
process, so that both see the same machine; peaks of memory are taken in a process each.

    python scripts/bench.py [--lengths 2048,4096,8192] [--memory 8192,16384] [--repeats 3]
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import demo_model
import numpy as np

NEW_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--memory", default="8192,16384")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", nargs=2, metavar=("WHO", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    directory = demo_model.cache_dir()
    demo_model.fetch(directory)
    if args.peak:
        print(json.dumps(peak(args.peak[0], directory, int(args.peak[1]))))
        return
    lengths = [int(text) for text in args.lengths.split(",")]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, jax {version('jax')}, torch {version('torch')}, "
        f"transformers {version('transformers')}; commit {commit()}\n"
    )
    print("| | qwen-jax | PyTorch | ratio |\n|---|---|---|---|")
    for what, tokens, pairs in timings(directory, lengths, args.repeats):
        ours, theirs = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(
            f"| {what} | {tokens / ours:.1f} tokens/s | {tokens / theirs:.1f} tokens/s "
            f"| {ratio:.2f} |",
            flush=True,
        )
    for length in (int(text) for text in args.memory.split(",")):
        ours, theirs = (
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--peak", who, str(length)],
                    check=True,
                    stdout=subprocess.PIPE,
                ).stdout
            )
            for who in ("ours", "torch")
        )
        print(
            f"| peak memory, prefill {length:,} | {ours / 2**20:.0f} MiB | "
            f"{theirs / 2**20:.0f} MiB | {theirs / ours:.2f} |",
            flush=True,
        )


def timings(directory: Path, lengths: list[int], repeats: int):
    """Times both; yields the name, the number of tokens, and pairs of seconds (ours, PyTorch's)."""
    ours, theirs = Ours(directory, max(lengths) + NEW_TOKENS), PyTorch(directory)
    rng = np.random.default_rng(0)

    def prompt(length: int) -> list[int]:
        return rng.integers(0, 49152, length).tolist()

    def pair(length: int, new_tokens: int) -> tuple[tuple[float, float], tuple[float, float]]:
        tokens = prompt(length)
        return ours.run(tokens, new_tokens), theirs.run(tokens, new_tokens)

    pair(min(lengths), 4)  # compiles ours and warms up both
    for length in lengths:
        pairs = [pair(length, 1) for _ in range(repeats)]
        yield f"prefill {length:,}", length, [(a[0], b[0]) for a, b in pairs]
    pairs = [pair(lengths[0], NEW_TOKENS) for _ in range(repeats)]
    decode = [(a[1], b[1]) for a, b in pairs]
    yield f"decode {NEW_TOKENS} at {lengths[0]:,}", NEW_TOKENS - 1, decode


class Ours:
    """Engine of this project, without Dual Chunk Attention, which transformers does not have."""

    def __init__(self, directory: Path, max_len: int):
        import jax.numpy as jnp

        from convert import weights
        from qwen_jax.engine.engine import Engine, EngineConfig
        from qwen_jax.models.configs import model_config

        config = dataclasses.replace(model_config(directory), dual_chunk=None, original_len=0)
        tree = weights.load(directory, dtype=jnp.dtype("float32"))
        self._engine = Engine(config, tree, EngineConfig(max_len=max_len))
        print(self._engine.describe(), file=sys.stderr)

    def run(self, tokens: list[int], new_tokens: int) -> tuple[float, float]:
        from qwen_jax.cli.bench import run

        return run(self._engine, tuple(tokens), new_tokens)


class PyTorch:
    """Model of transformers, with its default attention (scaled_dot_product_attention)."""

    def __init__(self, directory: Path):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(os.cpu_count() or 1)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def run(self, tokens: list[int], new_tokens: int) -> tuple[float, float]:
        """Returns seconds to the first token of a greedy answer, and from there to its last."""
        import torch

        start = time.perf_counter()
        with torch.inference_mode():
            ids = torch.tensor([tokens])
            out = self._model(ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            int(token)
            first = time.perf_counter()
            for _ in range(new_tokens - 1):
                out = self._model(
                    token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1
                )
                token = out.logits[:, -1:].argmax(-1)
                int(token)
        return first - start, time.perf_counter() - first


def peak(who: str, directory: Path, length: int) -> int:
    """Returns the peak memory of this process in bytes, after loading and prefilling once."""
    runner = Ours(directory, length + 1) if who == "ours" else PyTorch(directory)
    runner.run(np.random.default_rng(0).integers(0, 49152, length).tolist(), 1)
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
