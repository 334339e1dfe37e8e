"""score: logits of a token file, for comparing with other implementations."""

import collections
import contextlib
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Float32

from qwen_jax.cli import tokens as prompts
from qwen_jax.cli.flags import ModelArgument, ModelFlags, note, option
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.cli.profile import profiled
from qwen_jax.cli.progress import Progress
from qwen_jax.cli.quantities import tokens_option
from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.llm.model import open_model
from qwen_jax.llm.options import Within
from qwen_jax.storage import atomic

_COMMENT = b"qwen-jax score 1"  # of the archive


@expand_on_hosts
@profiled
def score(
    model: ModelArgument,
    model_flags: ModelFlags,
    tokens: Annotated[
        Path, option("A file of token ids: a JSON list, or integers between white space.")
    ],
    out: Annotated[Path, option("The .npz file to write.")],
    last: Annotated[
        int | None, tokens_option("Only this many last positions; all of them."), Within(1)
    ] = None,
):
    """Write the logits after each token of a file.

    The file gets one array, `logits`, of 32-bit floats [positions, vocabulary].
    It appears whole or not at all. No tokenizer is needed. The tokens are prefilled as the
    prompt of an answer would be: sparsely over the threshold, up to the dense tail.

    Examples:
        qwen-jax score ckpt/7b-1m --tokens ids.json --out logits.npz --last 64
        qwen-jax score ckpt/7b-1m --tokens ids.txt --out logits.npz --dtype f32 --dca off
    """
    opened = open_model(model, model_flags)
    ids = prompts.read(tokens, opened.config.vocab_size)
    if last is not None and last > len(ids):
        raise ConfigError(f"--last {last} must be from 1 to {len(ids)}, the tokens in {tokens}")
    opened.check_fits(len(ids))
    shape = (last or len(ids), opened.config.vocab_size)
    if multihost.is_first():
        _check_output(out, 4 * shape[0] * shape[1])
    engine = opened.engine(len(ids))
    with contextlib.closing(Progress(shape[0])) as progress:
        blocks = _counted(engine.score(ids, last=last), progress.update)
        if multihost.is_first():
            write_npz(out, blocks, shape)
        else:
            collections.deque(blocks, maxlen=0)
    note(f"wrote {out}: logits {list(shape)} f32")


def write_npz(
    path: Path, blocks: Iterable[Float32[np.ndarray, "n V"]], shape: tuple[int, int]
) -> None:
    """Writes blocks of rows as array `logits` of an .npz file, which appears when complete.

    Raises:
        FileExistsError: if there is a file that `write_npz` did not write.
        OSError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with (
            zipfile.ZipFile(partial, "x") as archive,
            archive.open("logits.npy", "w", force_zip64=True) as member,
        ):
            archive.comment = _COMMENT
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for block in blocks:
                member.write(np.ascontiguousarray(block, "<f4").data)
        atomic.check_ours(path, _is_ours)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _counted(blocks, update):
    done = 0
    for block in blocks:
        done += len(block)
        update(done)
        yield block


def _check_output(path: Path, size: int) -> None:
    """Checks, before long work, that the output can be written."""
    atomic.prepare(path)
    atomic.check_ours(path, _is_ours)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise ConfigError(
            f"{path} would take {size:,} bytes, {free:,} are free: ask for fewer with --last"
        )


def _is_ours(path: Path) -> bool:
    """Returns True if a file ends with the comment that `write_npz` writes."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_COMMENT)))
        return file.read() == _COMMENT
