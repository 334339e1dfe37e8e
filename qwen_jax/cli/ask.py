"""ask: answer a question about text files."""

from pathlib import Path
from typing import Annotated

import typer

from qwen_jax.cli.answer import front, respond, write
from qwen_jax.cli.flags import (
    AnswerFlags,
    Kv,
    ModelArgument,
    ModelFlags,
    System,
    note,
    option,
    refuse_text,
)
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.cli.profile import profiled
from qwen_jax.config import ConfigError
from qwen_jax.llm.answer import Answer

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
    if not question.strip():
        raise ConfigError("the question is empty: put it in quotes after the model")
    if kv is not None:
        refuse_text({"--file": file or None, "--exclude": exclude or None, "--system": system})
    llm = front(model, model_flags, answer_flags, kv)
    texts = {"files": file, "exclude": exclude, "system": system}
    call = llm.chat_call(question, answer_flags, **({} if kv else texts))
    respond(llm, call, write, _end)


def _end(done: Answer) -> None:
    print()
    note(done.summary)
