"""Text files and directories, read whole or refused by name; never shortened."""

import dataclasses
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.cells import cell_len

from qwen_jax import hosts
from qwen_jax.cli.console import console, shorten
from qwen_jax.reading import shown

_SNIFFED_BYTES = 8192
_LARGEST_BYTES = 1 << 30


class DocumentError(ValueError):
    """A file that cannot be read as text; the text names it and the way out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text file.

    Attributes:
        name: path by which the user knows it.
    """

    name: str
    text: str


def read(paths: Iterable[Path], *, skipped: Callable[[str], None]) -> list[Document]:
    """The text files that `paths` name, directories whole and in order of their names.

    Inside directories, hidden files and directories, links and files that are no
    text are skipped, each with a word to `skipped`. A path given itself is never
    skipped: it is read or refused.

    Raises:
        DocumentError: if a named path holds no text.
        OSError: if a file cannot be read.
    """
    documents = []
    for path in paths:
        if not path.is_dir():
            documents.append(Document(name=str(path), text=read_text(path)))
            continue
        found = []
        for file in _walk(path, skipped):
            try:
                found.append(Document(name=str(file), text=read_text(file)))
            except DocumentError as error:
                skipped(f"skipped {error}")
        if not found:
            raise DocumentError(f"{path} holds no text files")
        documents += found
    return documents


def joined(documents: Sequence[Document], question: str) -> str:
    """One message of documents and a question; several documents are told apart by name."""
    if len(documents) == 1:
        return f"{documents[0].text}\n\n{question}"
    named = [f"File: {document.name}\n\n{document.text}\n\n" for document in documents]
    return "".join([*named, question])


def print_table(rows: Sequence[tuple[str, int]], total: int, limit: int) -> None:
    """A table of tokens on stderr: per file, together, and what fits."""
    if not hosts.is_first():
        return
    sums = [("with the question and the chat template", total), ("fits, with the answer", limit)]
    counts = ["tokens", *(f"{count:,}" for _, count in [*rows, *sums])]
    digits = max(map(len, counts))
    room = console(stderr=True).width - digits - 2
    names = ["file", *(shorten(shown(name), room) for name, _ in rows), *(text for text, _ in sums)]
    width = min(room, max(map(cell_len, names)))
    for name, count in zip(names, counts, strict=True):
        print(f"{name}{' ' * (width - cell_len(name))}  {count:>{digits}}", file=sys.stderr)


def _walk(root: Path, skipped: Callable[[str], None]) -> Iterator[Path]:
    """Regular files below `root`, sorted; links are not followed, so there are no loops."""

    def fail(error: OSError):
        raise error

    for folder, names, files in os.walk(root, onerror=fail):
        hidden = [name for name in names if name.startswith(".")]
        names[:] = sorted(set(names) - set(hidden))
        for name in names:
            if Path(folder, name).is_symlink():
                skipped(f"skipped {Path(folder, name)}: it is a link")
        for name in sorted(files):
            path = Path(folder, name)
            if name.startswith("."):
                hidden.append(name)
            elif path.is_symlink():
                skipped(f"skipped {path}: it is a link")
            elif not path.is_file():
                skipped(f"skipped {path}: it is not a regular file")
            else:
                yield path
        if hidden:
            skipped(f"skipped {', '.join(sorted(hidden))} in {folder}: hidden")


def read_text(path: Path) -> str:
    """The text of one file.

    Raises:
        DocumentError: if it is binary, not UTF-8, or no file.
        OSError: if it cannot be read.
    """
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
        raise DocumentError(f"{path}: it is not a regular file")
    if status.st_size > _LARGEST_BYTES:
        raise DocumentError(f"{path}: {status.st_size:,} bytes are more than any model reads")
    data = path.read_bytes()
    zero = data.find(0, 0, _SNIFFED_BYTES)
    if zero >= 0:
        raise DocumentError(f"{path}: it is binary, not text (byte {zero} is zero)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{path}: it is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from None
