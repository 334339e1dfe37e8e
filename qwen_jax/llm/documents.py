"""Documents: text files and directories, read whole or refused by name, never truncated."""

import collections
import dataclasses
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pathspec

from qwen_jax.files import reading
from qwen_jax.files.reading import printable, shown
from qwen_jax.llm.options import Spell

STDIN = Path("-")
"""Path that stands for standard input."""

LARGEST_BYTES = 1 << 28  # some sixty million tokens: more than any model reads
_IGNORE_BYTES = 1 << 20
_SNIFFED_BYTES = 8192
_LISTED, _LARGEST_SHOWN = 10, 5  # skipped files: all of so few, else the largest

# First bytes of what users take for text, and the way to its text.
_FORMATS = (
    (b"%PDF-", "a PDF: take its text out, for example with pdftotext"),
    (b"PK\x03\x04", "a zip archive: unpack it, and name the files"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "compressed: unpack it, for example with gunzip"),
    (b"BZh91AY&SY", "compressed: unpack it, for example with bunzip2"),
    (b"\xfd7zXZ", "compressed: unpack it, for example with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed: unpack it, for example with unzstd"),
    (b"\xd0\xcf\x11\xe0", "an old Office document: save it as text"),
)
_ZIPPED = (
    (b"word/", "a Word document: save it as text, or convert it, for example with pandoc"),
    (b"xl/", "an Excel document: save its sheets as CSV"),
    (b"ppt/", "a PowerPoint document: save it as text"),
    (b"application/epub+zip", "an EPUB: convert it, for example with pandoc"),
    (b"application/vnd.oasis", "an OpenDocument: save it as text"),
)


class DocumentError(ValueError):
    """Error of a file that cannot be read as text; names it and the remedy."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text file.

    Attributes:
        name: path as the user wrote it, or below a directory that the user named.
        text: content of the file.
    """

    name: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Skipped:
    path: Path
    kind: str
    reason: str


def read(
    paths: Iterable[Path],
    *,
    skipped: Callable[[str], None],
    exclude: Sequence[str] = (),
    spell: Spell = str,
) -> list[Document]:
    """Reads text files; directories are read recursively, sorted by name.

    Inside directories, hidden files and directories, links, matches of `.gitignore` or `exclude`,
    and files that are not text are skipped. A path in `paths` itself is never skipped: it is read
    or refused.

    Args:
        paths: files and directories; `STDIN` is standard input.
        skipped: called with a line for each skipped file, or, if there are many, for the largest
            ones and for their number.
        exclude: `.gitignore` patterns, relative to each directory.
        spell: spells the names of these arguments in errors.

    Raises:
        DocumentError: if a named path holds no text or cannot be read.
    """
    paths = list(paths)
    if paths.count(STDIN) > 1:
        raise DocumentError("standard input (-) is given twice: it can be read once")
    if exclude and not any(path.is_dir() for path in paths):
        raise DocumentError(
            f"{spell('exclude')} is for directories, and no {spell('files')} names one: "
            "leave it out"
        )
    documents, left_out = [], []
    for path in paths:
        if not path.is_dir():
            name = "standard input" if path == STDIN else str(path)
            documents.append(Document(name=name, text=read_text(path)))
            continue
        found = []
        for file in _walk(path, exclude, left_out.append, spell("exclude")):
            try:
                found.append(Document(name=str(file), text=read_text(file)))
            except DocumentError as error:
                left_out.append(_Skipped(file, "not text", str(error)))
        if not found:
            raise DocumentError(f"{shown(path)} holds no text files")
        documents += found
    for line in _told(left_out):
        skipped(line)
    return documents


def joined(documents: Sequence[Document], question: str) -> str:
    """Joins documents and a question to one message; several documents are preceded by names."""
    if len(documents) == 1:
        return f"{documents[0].text}\n\n{question}"
    named = [f"File: {document.name}\n\n{document.text}\n\n" for document in documents]
    return "".join([*named, question])


def _told(left_out: Sequence[_Skipped]) -> list[str]:
    """Describes skipped files in lines: all, or the largest of many and the number of each kind."""
    if len(left_out) <= _LISTED:
        return [f"skipped {each.reason}" for each in left_out]
    sizes = [_size(each.path) for each in left_out]
    largest = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)[:_LARGEST_SHOWN]
    lines = [f"skipped {left_out[i].reason} ({sizes[i]:,} bytes)" for i in largest]
    kinds = collections.Counter(each.kind for each in left_out)
    counted = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    return [
        *lines,
        f"skipped {len(left_out):,} in all: {counted}; the files among them have "
        f"{sum(sizes):,} bytes",
    ]


def _size(path: Path) -> int:
    try:
        status = path.lstat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _walk(
    root: Path, exclude: Sequence[str], skip: Callable[[_Skipped], None], name_of_exclude: str
) -> Iterator[Path]:
    """Yields the regular files below `root`, sorted; does not follow links.

    Args:
        skip: called with every file and directory that is skipped.
        name_of_exclude: name of the argument `exclude` in errors.
    """

    def fail(error: OSError):
        raise DocumentError(f"{shown(error.filename)} cannot be read: {reading.reason(error)}")

    for pattern in exclude:
        if _pattern(pattern) is None:
            raise DocumentError(
                f"{name_of_exclude} '{printable(pattern)}' is no pattern of .gitignore files"
            )
    excluded = _spec(exclude)
    rules = _Rules(root)
    for folder, names, files in os.walk(root, onerror=fail):
        rules.enter(Path(folder))
        kept = []
        for name in sorted([*names, *files]):
            path, is_folder = Path(folder, name), name in names
            below = path.relative_to(root).as_posix() + "/" * is_folder
            if name.startswith("."):
                skip(_Skipped(path, "hidden", f"{shown(path)}: it is hidden"))
            elif path.is_symlink():
                skip(_Skipped(path, "links", f"{shown(path)}: it is a link"))
            elif _verdict(excluded, below):
                skip(_Skipped(path, "excluded", f"{shown(path)}: {name_of_exclude} names it"))
            elif rules.ignore(path, is_folder):
                skip(_Skipped(path, "ignored", f"{shown(path)}: .gitignore names it"))
            elif is_folder:
                kept.append(name)
            elif not path.is_file():
                skip(_Skipped(path, "not regular", f"{shown(path)}: it is not a regular file"))
            else:
                yield path
        names[:] = kept


class _Rules:
    """Rules of `.gitignore` files in and below a directory, and above it in its repository.

    As in git, the nearest file with a matching pattern decides, and nothing below an ignored
    directory is included again.
    """

    def __init__(self, root: Path):
        self._specs: dict[Path, pathspec.GitIgnoreSpec] = {}
        above = Path(os.path.abspath(root))  # without `..`, which is no parent of its own
        parents = list(above.parents)
        repository = next((i for i, each in enumerate(parents) if (each / ".git").exists()), -1)
        if not (above / ".git").exists():
            for parent in parents[: repository + 1]:
                self.enter(parent)
        if self.ignore(above, True):  # it was named, so it is not ignored itself
            self._specs.clear()

    def enter(self, folder: Path) -> None:
        """Reads the rules of a directory."""
        path = folder / ".gitignore"
        if path.is_file() and not path.is_symlink():
            text = reading.read_bytes(path, limit=_IGNORE_BYTES, error=DocumentError)
            lines = os.fsdecode(text).splitlines()
            self._specs[Path(os.path.abspath(folder))] = _spec(lines)

    def ignore(self, path: Path, is_folder: bool) -> bool:
        path = Path(os.path.abspath(path))
        for folder in path.parents:
            if folder in self._specs:
                below = path.relative_to(folder).as_posix() + "/" * is_folder
                verdict = _verdict(self._specs[folder], below)
                if verdict is not None:
                    return verdict
        return False


def _verdict(spec: pathspec.GitIgnoreSpec, path: str) -> bool | None:
    """Returns whether the last pattern that matches a path ignores it; None if none matches.

    Patterns that match a parent of the path do not count.
    """
    for pattern in reversed(list(spec.patterns)):
        expression = getattr(pattern, "regex", None)  # None for a comment
        for match in expression.finditer(path) if expression else ():
            # The group is a slash after what matched: before the end, that was a parent.
            if not match.groupdict().get("ps_d") or match.end() == len(path):
                return pattern.include
    return None


def _spec(lines: Iterable[str]) -> pathspec.GitIgnoreSpec:
    return pathspec.GitIgnoreSpec([each for line in lines for each in _pattern(line) or ()])


def _pattern(line: str) -> list[Any] | None:
    """Parses a line of a `.gitignore` file; None for an invalid pattern, which git skips."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, on classes such as [[:alpha:]]
        try:
            return list(pathspec.GitIgnoreSpec.from_lines([line]).patterns)
        except (ValueError, re.error):
            return None


def read_text(path: Path) -> str:
    """Reads the text of one file or pipe, or of standard input.

    Raises:
        DocumentError: if it is binary, not UTF-8, too large, no file, or cannot be read.
    """
    if path == STDIN:
        name, data = "standard input", sys.stdin.buffer.read(LARGEST_BYTES + 1)
        if len(data) > LARGEST_BYTES:
            raise DocumentError(f"{name} has more than the {LARGEST_BYTES:,} bytes allowed")
    else:
        name = shown(path)
        data = reading.read_bytes(path, limit=LARGEST_BYTES, error=DocumentError, pipes=True)
    known = next((what for magic, what in _FORMATS if data.startswith(magic)), None)
    if data.startswith(b"PK\x03\x04"):
        known = next((what for mark, what in _ZIPPED if mark in data), known)
    if known is not None:
        raise DocumentError(f"{name}: it is {known}")
    zero = data.find(0, 0, _SNIFFED_BYTES)
    try:
        if zero < 0:
            return data.decode("utf-8-sig")
        reason = f"it is binary, not text (byte {zero} is zero)"
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 (byte {error.start}); convert it, for example with iconv"
    encoding = _wide_encoding(data)
    if encoding is not None:
        reason = f"it is {encoding}: convert it, for example with iconv -f {encoding} -t UTF-8"
    raise DocumentError(f"{name}: {reason}")


def _wide_encoding(data: bytes) -> str | None:
    """Guesses the encoding of a text in UTF-16 or UTF-32; None if it is neither."""
    marks = (
        (b"\xff\xfe\0\0", "UTF-32"),
        (b"\0\0\xfe\xff", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    )
    marked = next((name for mark, name in marks if data.startswith(mark)), None)
    if marked or 0 not in data[:_SNIFFED_BYTES]:
        return marked
    for name, width in (("UTF-32LE", 4), ("UTF-32BE", 4), ("UTF-16LE", 2), ("UTF-16BE", 2)):
        if len(data) % width:
            continue
        try:
            # What is cut ends in half a character at worst, which the last two units hold.
            text = data[:_SNIFFED_BYTES].decode(name, "strict")
        except UnicodeDecodeError as error:
            if len(data) <= _SNIFFED_BYTES or error.start < _SNIFFED_BYTES - 4:
                continue
            text = data[: error.start].decode(name)
        usual = sum(each.isprintable() or each in "\n\r\t" for each in text)
        if usual >= 0.95 * len(text) and any(each in " \r\n" or each.isalpha() for each in text):
            return name
    return None
