"""The commands convert and export."""

import contextlib
import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import jax
import typer

from convert import export as exports
from convert import pickled, publish, source, weights
from convert.terminal import say, show, shown
from qwen_jax.distributed import multihost
from qwen_jax.models.configs import notes
from qwen_jax.storage import hub
from qwen_jax.storage.manifest import DTYPES, Progress


def convert(
    src: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Hugging Face directory, or a snapshot of its cache."),
    ],
    dst: Annotated[
        Path,
        typer.Argument(metavar="DST", help="Checkpoint to make; it appears when complete."),
    ],
    dtype: Annotated[
        Literal["keep", "f32", "bf16"], typer.Option(help="Precision of the stored weights.")
    ] = "keep",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a DST that convert wrote; it stays whole until the new one is.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a stopped run; harmless without one.")
    ] = False,
    allow_pickle_weights: Annotated[
        bool,
        typer.Option(
            "--allow-pickle-weights",
            help="Also read weights that exist as .bin only, with PyTorch, in a process of its "
            "own. Such files can attack their reader: prefer safetensors.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check SRC, say what would be written, and stop.")
    ] = False,
) -> None:
    """Convert a Hugging Face checkpoint to an Orbax checkpoint.

    Every file of SRC is checked before anything is written, and what is
    written is read back and gets a SHA-256 sum. Memory stays near that of a
    layer, whatever the size of the model. --resume continues a stopped run.
    Several processes that see one file system share the layers.
    """
    stored = {"keep": "keep", "f32": "float32", "bf16": "bfloat16"}[dtype]
    if dry_run:
        publish.place(dst)
        directory = hub.checkpoint(src)
        with contextlib.ExitStack() as stack:
            read, what = directory, "all intact"
            if allow_pickle_weights and pickled.only(directory):
                read = stack.enter_context(pickled.headers(directory))
                what = "whose tensors are those of config.json"
            checked = source.check(read)
        _say_notes(src)
        sizes = [
            tensor.size
            if dtype == "keep"
            else tensor.size // DTYPES[tensor.dtype].itemsize * DTYPES[stored].itemsize
            for tensor in checked.tensors.values()
        ]
        parent = next(path for path in dst.resolve().parents if path.exists())
        show(
            [
                ("source", f"{directory}, {len(checked.shards)} file(s), {what}"),
                ("tensors", f"{len(checked.tensors)}"),
                ("would write", f"{dst}, {sum(sizes) / 1e9:.2f} GB, dtype {dtype}"),
                ("free there", f"{shutil.disk_usage(parent).free / 1e9:.2f} GB"),
            ]
        )
        return
    again = ["qwen-jax", "convert", str(src), str(dst), "--dtype", dtype, "--resume"]
    again += ["--allow-pickle-weights"] * allow_pickle_weights
    with _stoppable("convert", f"continue with: {shlex.join(again)}") as progress:
        manifest = weights.convert(
            src,
            dst,
            dtype=stored,
            overwrite=overwrite,
            resume=resume,
            allow_pickle=allow_pickle_weights,
            progress=progress,
        )
    _say_notes(src)
    show(
        [
            ("checkpoint", str(dst)),
            ("parameters", f"{manifest.num_parameters:,}"),
            ("tensors", f"{len(manifest.tensors)}, dtype {manifest.dtype}"),
            ("size", f"{manifest.num_bytes / 1e9:.2f} GB in {len(manifest.files) + 1} files"),
            ("next", f"qwen-jax chat {shlex.quote(str(dst))}"),
        ]
    )


def export(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Converted checkpoint.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Hugging Face directory to make.")],
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a DST that export wrote; it stays whole until the new one is.",
        ),
    ] = False,
) -> None:
    """Write a converted checkpoint as the Hugging Face directory it came from.

    Files, tensors and headers are those of the source, byte for byte, unless
    the conversion changed the dtype. One file more, .qwen-jax-export.json, has
    their sums: --overwrite replaces a DST that is as they say.
    """
    with _stoppable("export", "nothing was written: start again") as progress:
        differences = exports.export(src, dst, overwrite=overwrite, progress=progress)
    same = "every byte as in the source"
    show([("checkpoint", str(dst)), ("contents", "; ".join(differences) or same)])


def _say_notes(src: Path) -> None:
    """Print notes on fields of a checkpoint that are ignored."""
    if multihost.is_first():
        for sentence in notes(hub.checkpoint(src)):
            say(sentence)


@contextlib.contextmanager
def _stoppable(label: str, hint: str) -> Iterator[Progress]:
    """Yield a progress callback that ends the command with a hint after Ctrl-C or SIGTERM.

    Orbax cannot be interrupted while it saves, so the command ends between two steps; a second
    signal ends it at once, which loses no more than that step. Accelerators are not initialised.
    """
    jax.config.update("jax_platforms", "cpu")  # the weights only pass through host memory
    stopping = False

    def stop(*_) -> None:
        nonlocal stopping
        if stopping:
            os._exit(130)
        stopping = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with shown(label) as progress:

            def step(done: int, total: int) -> None:
                if stopping:
                    raise KeyboardInterrupt
                progress(done, total)

            yield step
    except KeyboardInterrupt:
        say(f"stopped; {hint}")
        raise typer.Exit(130) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
