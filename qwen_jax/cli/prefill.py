"""prefill: read a long prompt once and keep its keys and values on disk."""

import contextlib
import signal
from pathlib import Path
from typing import Annotated

from qwen_jax.cli import tokens as prompts
from qwen_jax.cli.answer import interrupts
from qwen_jax.cli.ask import Exclude, Files
from qwen_jax.cli.flags import ModelArgument, ModelFlags, System, option
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.cli.profile import profiled
from qwen_jax.cli.progress import Progress
from qwen_jax.cli.quantities import tokens_option
from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.llm.llm import LLM
from qwen_jax.llm.model import open_model
from qwen_jax.llm.options import Within


@expand_on_hosts
@profiled
def prefill(
    model: ModelArgument,
    model_flags: ModelFlags,
    out: Annotated[Path, option("Directory of the session.", metavar="DIR")],
    file: Files = None,
    exclude: Exclude = None,
    system: System = None,
    prompt_file: Annotated[Path | None, option("A UTF-8 file of raw text, for `generate`.")] = None,
    tokens: Annotated[
        Path | None, option("A file of token ids, for `generate`: a JSON list, or integers.")
    ] = None,
    save_every: Annotated[
        int,
        tokens_option(
            "Tokens between two savings, in memory twice while they are saved.", shown=True
        ),
        Within(1),
    ] = 65536,
    overwrite: Annotated[
        bool, option("Replace another session that is there.", "--overwrite")
    ] = False,
):
    """Read a long prompt once and keep its keys and values on disk.

    `ask`, `chat`, `generate` and `batch` go on after it with --kv DIR, on any mesh and
    number of devices. Of --file, as in `ask`, any number of questions can be asked; raw
    text and token ids are for `generate`. A prefill that was stopped or killed goes on
    with the same command where it saved last; after SIGTERM it saves and exits with 75.
    On several hosts DIR must be the same directory for all.

    Examples:
        qwen-jax prefill ckpt/7b-1m --file book.txt --out kv/book
        qwen-jax ask ckpt/7b-1m --kv kv/book "Who is the narrator?"
    """
    source = prompts.one_of({"--file": file, "--prompt-file": prompt_file, "--tokens": tokens})
    for flag, value in {"--system": system, "--exclude": exclude or None}.items():
        if value is not None and not file:
            raise ConfigError(f"{flag} contradicts {source}, which is raw: leave it out")
    with interrupts(signal.SIGTERM) as stopped, contextlib.ExitStack() as stack:
        bar = None

        def shown(done: int, total: int) -> None:
            nonlocal bar
            bar = bar or stack.enter_context(contextlib.closing(Progress(total)))
            bar.update(done)
            if stopped():
                raise multihost.Preempted if stopped() == signal.SIGTERM else KeyboardInterrupt

        llm = LLM.of(open_model(model, model_flags))
        text = None
        if not file:
            text = prompts.prompt(None, prompt_file, tokens, llm.opened.config.vocab_size)
        llm.prefill(
            text,
            out=out,
            files=file or None,
            exclude=exclude or None,
            system=system,
            save_every=save_every,
            overwrite=overwrite,
            progress=shown,
        )
