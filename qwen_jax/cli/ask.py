"""ask: answer a question about text files."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.cells import cell_len

from qwen_jax.cli.answer import answer, write
from qwen_jax.cli.console import console, shorten
from qwen_jax.cli.flags import (
    AnswerFlags,
    Kv,
    ModelArgument,
    ModelFlags,
    System,
    note,
    option,
    refuse_text,
    says,
    spelled,
)
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.cli.profile import profiled
from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.engine.request import Request
from qwen_jax.files.reading import shown
from qwen_jax.llm import documents, sessions
from qwen_jax.llm.model import open_model
from qwen_jax.text.tokenizer import Stream, Tokenizer

Files = Annotated[
    list[Path] | None,
    option(
        "A text file, a directory, or - for standard input; may be given repeatedly.",
        metavar="PATH",
    ),
]
Exclude = Annotated[
    list[str] | None,
    option(
        "Leave out what a pattern as in .gitignore names in directories; may be given repeatedly.",
        metavar="GLOB",
    ),
]


@expand_on_hosts
@profiled
def ask(
    model: ModelArgument,
    question: Annotated[
        str, typer.Argument(help="What to ask.", metavar="QUESTION", show_default=False)
    ],
    model_flags: ModelFlags,
    answer_flags: AnswerFlags,
    file: Files = None,
    exclude: Exclude = None,
    system: System = None,
    kv: Kv = None,
):
    """Answer a question about text files.

    The files come first, the question last, in one turn of ChatML; markers such
    as <|im_end|> in them are ordinary characters. Directories are read whole, in
    order of their names, without hidden files, links, what .gitignore or --exclude
    names, and files that are no UTF-8 text. What does not fit is refused, never
    shortened. Files that `prefill` has read are named by --kv instead, and read from
    its session.

    Examples:
        qwen-jax ask ckpt/7b-1m --file book.txt "Who is the narrator?"
        qwen-jax ask ckpt/7b-1m --kv kv/book "Who is the narrator?"
        qwen-jax ask ckpt/7b-1m --file src/ --file README.md "Where is the cache cleared?"
    """
    question = question.strip()  # or line breaks before it would join those after the files
    if not question:
        raise ConfigError("the question is empty: put it in quotes after the model")
    opened = open_model(model, model_flags)
    sampling = answer_flags.sampling(opened.generation)
    stops = answer_flags.stops()
    tokenizer = opened.tokenizer()
    tokenizer.check_chatml()
    kept = None
    if kv is not None:
        refuse_text({"--file": file or None, "--exclude": exclude or None, "--system": system})
        kept = sessions.open_kept(opened, kv, chat=True)

    def read() -> tuple[list[tuple[str, int]], list[int]]:
        texts = read_files(file or (), tokenizer, exclude=exclude or ())
        messages = [{"role": "user", "content": documents.joined(list(texts), question)}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        rows = [(document.name, count) for document, count in texts.items()]
        return rows, tokenizer.encode_chat(messages)

    if kept is None:
        rows, ids = multihost.broadcast_json(read)
    else:
        rows, ids = kept.documents, [*kept.tokens, *kept.question(tokenizer, question)]
    ids = tuple(ids)
    request = Request(
        prompt=ids,
        max_new_tokens=answer_flags.max_new_tokens,
        sampling=sampling,
        eos_ids=opened.end_ids(tokenizer, chat=True),
    )
    if rows:
        print_table(rows, len(ids), opened.max_len)
    opened.check_fits(len(ids), request.max_new_tokens)
    engine = opened.engine(
        len(ids) + request.max_new_tokens,
        vocab_limit=tokenizer.size,
        prefix_tokens=len(kept.tokens) if kept else 0,
        window=kept.window if kept else 0,
    )
    if kept is not None:
        kept.restore(engine, note)
    done = answer(engine, request, stream=Stream(tokenizer, stop=stops), write=write)
    print()
    note(done.summary)
    if done.finish_reason == "cancelled":
        raise KeyboardInterrupt


def read_files(
    paths: Iterable[Path], tokenizer: Tokenizer, *, exclude: Sequence[str] = ()
) -> dict[documents.Document, int]:
    """Reads documents with their numbers of tokens; prints which files were skipped.

    Raises:
        DocumentError: if a named path holds no text or cannot be read.
    """
    found = documents.read(paths, skipped=note, exclude=exclude, spell=spelled)
    return {document: len(tokenizer.encode_text(document.text)) for document in found}


def print_table(rows: Sequence[tuple[str, int]], total: int, limit: int) -> None:
    """Prints a table of tokens to stderr: per file, in total, and the limit."""
    if not says():
        return
    sums = [("with the question and the chat template", total), ("fits, with the answer", limit)]
    counts = ["tokens", *(f"{count:,}" for _, count in [*rows, *sums])]
    digits = max(map(len, counts))
    room = console(stderr=True).width - digits - 2
    names = ["file", *(shorten(shown(name), room) for name, _ in rows), *(text for text, _ in sums)]
    width = min(room, max(map(cell_len, names)))
    for name, count in zip(names, counts, strict=True):
        print(f"{name}{' ' * (width - cell_len(name))}  {count:>{digits}}", file=sys.stderr)
