"""KV sessions: prompts that were prefilled once, stored on disk with their keys and values.

A session is a directory:

    session.json     list of its content, with checksums (see `Session`)
    tokens           the prompt, four bytes an id, little-endian
    window_000000    Orbax checkpoints of keys and values [layers, tokens, kv_heads, head_dim]
    window_000001    of consecutive tokens, in order of their positions, without pages or
    ...              shards, so that any mesh can take them
    lock             locked by the process that writes

Windows are added one by one, each listed in session.json once it is whole on disk; a
stopped prefill resumes after the last of them. The processes of a job write and read one
directory, which all of them must see; process 0 alone writes session.json.

Nothing in a session is trusted: sizes are compared with the model's before anything is
allocated, and content with its checksums before it is used.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, structs

from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.files import schema
from qwen_jax.files.reading import JSON_BYTES, read_bytes, reason, shown
from qwen_jax.files.schema import Record, named
from qwen_jax.storage import atomic, manifest
from qwen_jax.storage.manifest import DTYPES, CheckpointError, Dtype, File, file_sums

FORMAT = "qwen-jax session 1"
_MANIFEST, _TOKENS, _LOCK = "session.json", "tokens", "lock"
_WINDOW = r"window_\d{6}"
_INSIDE = rf"{_WINDOW}(/[\w.-]+)+"
_PARTIAL = re.compile(rf"({_MANIFEST}|{_TOKENS})(\.[0-9a-f]{{8}})?\.partial")
_OURS = re.compile(rf"{_MANIFEST}|{_TOKENS}|{_LOCK}|{_PARTIAL.pattern}|{_WINDOW}(\.orbax-[\w.-]+)?")
_MOST_TOKENS = 1 << 28
_Count = Annotated[int, Meta(ge=1, le=_MOST_TOKENS)]
_READERS = 8  # threads that compute checksums
_FIGURES = {"density", "recall", "least_recall", "pairs", "tokens"}
_AGAIN = "prefill again with --overwrite"


class SessionError(ConfigError):
    """Error of a session that cannot be used or written; names it and the remedy."""


class Window(Record, frozen=True):
    """Keys and values of the tokens from `start` to `stop`.

    Attributes:
        name: name of its folder in the session.
        size: tokens in the arrays, padding included.
        files: sizes and checksums of its files, by path in the session.
    """

    name: Annotated[str, named(_WINDOW, "the name of a window")]
    start: Annotated[int, Meta(ge=0)]
    stop: _Count
    size: _Count
    files: Annotated[
        dict[Annotated[str, named(_INSIDE, "the name of a file in a window")], File],
        Meta(min_length=1),
    ]

    @property
    def num_bytes(self) -> int:
        """Total size of its files in bytes."""
        return sum(file.size for file in self.files.values())


class Identity(Record, frozen=True):
    """Everything that the keys and values of a prompt depend on.

    Attributes:
        weights: fingerprint of the model's weights.
        tokenizer: fingerprint of the tokenizer's files.
        settings: settings of attention and of sparse prefill, by name.
        dtype: dtype of keys and values.
        shape: layers, kv_heads and head_dim.
        num_tokens: length of the prompt.
        tokens_sha256: SHA-256 of the file `tokens`.
        is_chat: whether the prompt ends inside a user's turn, where a question can follow.
    """

    weights: str
    tokenizer: str
    settings: dict[str, Any]
    dtype: Dtype
    shape: tuple[_Count, _Count, _Count]
    num_tokens: _Count
    tokens_sha256: str
    is_chat: bool

    def difference(self, other: "Identity") -> str | None:
        """Describes the first difference, with both values; None if there is none."""
        words = {"weights": "weights", "tokenizer": "tokenizer files", "dtype": "dtype"}
        for name, text in words.items():
            if getattr(self, name) != getattr(other, name):
                return f"{text}: {getattr(self, name)} there, {getattr(other, name)} here"
        for name in {**self.settings, **other.settings}:
            there, here = self.settings.get(name), other.settings.get(name)
            if there != here:
                return f"{name}: {_shown(there)} there, {_shown(here)} here"
        if self.shape != other.shape:
            return f"layers, kv_heads and head_dim: {self.shape} there, {other.shape} here"
        if (self.num_tokens, self.tokens_sha256) != (other.num_tokens, other.tokens_sha256):
            return f"the prompt: {self.num_tokens:,} tokens there, {other.num_tokens:,} here"
        if self.is_chat != other.is_chat:
            return "a prompt of raw text and one of a chat"
        return None


class Session(Record, frozen=True):
    """Content of a session.

    Attributes:
        versions: versions of this package and of the libraries that wrote the files.
        identity: what its keys and values depend on.
        documents: names of the files in the prompt, with their numbers of tokens.
        sparse: figures of sparse prefill so far (`engine.request.Sparseness`); None if dense.
        windows: consecutive windows, which together hold the saved tokens.
    """

    versions: dict[str, str]
    identity: Identity
    documents: tuple[tuple[str, int], ...]
    sparse: dict[str, int | float] | None
    windows: tuple[Window, ...]

    @property
    def saved(self) -> int:
        """Number of tokens on disk."""
        return self.windows[-1].stop if self.windows else 0

    @property
    def is_complete(self) -> bool:
        return self.saved == self.identity.num_tokens

    @property
    def num_bytes(self) -> int:
        """Total size of all windows in bytes."""
        return sum(window.num_bytes for window in self.windows)

    def encode(self) -> bytes:
        """Encodes the content of session.json, which includes its own checksum."""
        return manifest.seal(FORMAT, self)

    @property
    def sha256(self) -> str:
        """SHA-256 of session.json, and so of everything that it lists."""
        return hashlib.sha256(self.encode()).hexdigest()


def read(directory: Path) -> Session:
    """Reads session.json and checks that its fields are consistent.

    Raises:
        SessionError: if there is none, or it is damaged or of another format.
    """
    path = directory / _MANIFEST
    if _is_missing(path):
        raise SessionError(
            f"{shown(directory)} is not a KV session, it has no {_MANIFEST}: make one with "
            "`qwen-jax prefill --out`"
        )
    content = _read(path, limit=JSON_BYTES)
    try:
        return manifest.unseal(path, content, FORMAT, _decoded, _AGAIN)
    except CheckpointError as error:
        raise SessionError(str(error)) from None


def _decoded(body: dict[str, Any]) -> Session:
    """Decodes the body of what `Session.encode` wrote.

    Raises:
        ValueError: if its values are inconsistent; KeyError or TypeError if fields are malformed.
    """
    found = schema.read(body, Session)
    if not _is_sound(found):
        raise ValueError("what is in the session does not fit together")
    return found


def read_tokens(directory: Path, session: Session) -> tuple[int, ...]:
    """Reads the token ids of a session's prompt.

    Raises:
        SessionError: if the file is missing or damaged.
    """
    path = directory / _TOKENS
    data = _read(path, limit=4 * _MOST_TOKENS)
    if hashlib.sha256(data).hexdigest() != session.identity.tokens_sha256:
        raise SessionError(
            f"{shown(path)} is damaged: its SHA-256 is not that of {_MANIFEST}; {_AGAIN}"
        )
    return tuple(np.frombuffer(data, "<i4").tolist())


def encode_tokens(tokens: tuple[int, ...]) -> bytes:
    """Encodes token ids as the content of the file `tokens`: little-endian int32."""
    return np.asarray(tokens, "<i4").tobytes()


def check(
    directory: Path,
    session: Session,
    *,
    share: bool = True,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Compares every file of the windows with its size and checksum.

    Args:
        share: divide the files between the processes of a job, all of which must call this.
        on_bytes: called, from several threads, with numbers of bytes that were read.

    Raises:
        SessionError: naming the first file that differs, is missing or is not listed.
    """
    listed = {name: file for window in session.windows for name, file in window.files.items()}
    for window in session.windows:
        folder = directory / window.name
        for path in (folder, *sorted(folder.rglob("*"))):
            if path.is_symlink():
                raise SessionError(
                    f"{shown(path)} is a link, a session holds its files itself: {_AGAIN}"
                )
            named = path.relative_to(directory).as_posix() in listed
            if not named and path.exists() and not path.is_dir():
                raise SessionError(f"{shown(path)} is not in {_MANIFEST}: remove it")
    for name, file in listed.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise SessionError(f"{path} is missing or not a file: {_AGAIN}")
        if size != file.size:
            raise SessionError(f"{path} has {size} bytes instead of {file.size}: {_AGAIN}")

    def compare(name: str) -> None:
        path = directory / name
        try:
            same = file_sums(path, on_bytes) == listed[name]
        except OSError as error:
            raise SessionError(f"{shown(path)} cannot be read: {reason(error)}") from None
        if not same:
            raise SessionError(
                f"{shown(path)} is damaged: its SHA-256 is not that of {_MANIFEST}; {_AGAIN}"
            )

    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(compare, multihost.local_share(sorted(listed)) if share else listed):
            pass
    if share:
        multihost.await_all()


def check_arrays(directory: Path, session: Session) -> None:
    """Checks name, shape and dtype of every window's arrays; reads only their metadata.

    Raises:
        SessionError: naming the first window whose arrays are missing or different.
    """
    import jax

    from qwen_jax.storage import orbax_io

    layers, heads, head_dim = session.identity.shape
    for window in session.windows:
        shape = layers, window.size, heads, head_dim
        array = jax.ShapeDtypeStruct(shape, DTYPES[session.identity.dtype])
        with _sentences():
            orbax_io.check((directory / window.name).absolute(), {"keys": array, "values": array})


def stamp(directory: Path, session: Session) -> tuple[tuple[int, ...] | None, ...]:
    """Returns a stamp that changes when one of a session's files is written or replaced.

    It holds device, inode, size and modification time of each file.
    """
    found = []
    for name in (_MANIFEST, _TOKENS, *(name for each in session.windows for name in each.files)):
        try:
            status = (directory / name).stat()
            found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)


def load(directory: Path, session: Session, window: Window, target):
    """Loads keys and values of a window onto the devices.

    Args:
        target: `jax.ShapeDtypeStruct` of either array, with its sharding (`Engine.window`).

    Returns:
        Keys and values, arrays [layers, tokens, kv_heads, head_dim].

    Raises:
        SessionError: if the files cannot be read, or hold other arrays.
    """
    import jax

    from qwen_jax.storage import orbax_io

    layers, heads, head_dim = session.identity.shape
    shape = layers, window.size, heads, head_dim
    dtype = DTYPES[session.identity.dtype]
    if target.shape != shape or target.dtype != dtype:
        raise SessionError(
            f"{directory / window.name} holds {dtype}{shape}, "
            f"the model takes {target.dtype}{target.shape}"
        )
    abstract = jax.ShapeDtypeStruct(shape, dtype, sharding=target.sharding)
    folder = (directory / window.name).absolute()
    with _sentences():
        found = orbax_io.load(folder, {"keys": abstract, "values": abstract})
    return found["keys"], found["values"]


class Writer:
    """Writer of a session; locks it, so that one job at a time writes it.

    Args:
        directory: an empty or missing directory, or a session of the same prompt to resume.
        identity: identity of the session.
        tokens: token ids of the prompt.
        documents: names of the files in the prompt, with their numbers of tokens.
        versions: versions of the libraries that write the files.
        overwrite: delete another session, or a damaged one, in the directory.

    Attributes:
        session: the session as it is on disk.

    Raises:
        SessionError: if the directory holds something else, or another job writes it.
    """

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        tokens: tuple[int, ...],
        *,
        documents: tuple[tuple[str, int], ...],
        versions: Mapping[str, str],
        overwrite: bool = False,
    ):
        self.directory = directory
        self._lock: int | None = None
        blank = Session(
            versions=dict(versions),
            identity=identity,
            documents=documents,
            sparse=None,
            windows=(),
        )
        self.session = blank

        def begin() -> str:
            """Opens or creates the session in process 0; returns its checksum for the others."""
            from qwen_jax.storage import orbax_io

            with _writing(directory), _sentences():
                orbax_io.check_path(directory)
                self._refuse_foreign()
                directory.mkdir(parents=True, exist_ok=True)
                busy = SessionError(
                    f"{directory} is being written by another run: wait for it or name another "
                    "directory"
                )
                self._lock = atomic.lock(directory / _LOCK, busy)
                there = self._there(identity, overwrite)
                if there is None:
                    self._write(blank)  # first: what is there belongs to nothing any more
                    self._drop_rest()
                    atomic.write(directory / _TOKENS, encode_tokens(tokens))
                else:
                    self.session = there
                    self._drop_rest()
            return self.session.sha256

        try:
            digest = multihost.broadcast_json(begin)
            if not multihost.is_first():
                self.session = self._seen(digest)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Releases the lock of the session; may be called twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def add(self, stop: int, keys, values, sparse: Mapping[str, float] | None = None) -> None:
        """Writes a window: the tokens from the end of the last window to `stop`.

        Args:
            stop: position after the last token of the window.
            keys: array [layers, tokens, kv_heads, head_dim], which may be padded.
            values: array like `keys`.
            sparse: figures of sparse prefill so far; None if dense.

        Raises:
            SessionError: if the disk is full or fails; earlier windows are kept.
        """
        from qwen_jax.storage import orbax_io

        before = self.session
        name = f"window_{len(before.windows):06d}"
        folder = self.directory.absolute() / name
        try:
            orbax_io.save(folder, {"keys": keys, "values": values})
            files = multihost.broadcast_json(lambda: _sums(self.directory, folder))
            window = Window(
                name=name,
                start=before.saved,
                stop=stop,
                size=keys.shape[1],
                files=schema.read(files, dict[str, File]),
            )
            self.session = structs.replace(
                before,
                sparse=None if sparse is None else dict(sparse),
                windows=(*before.windows, window),
            )
            if multihost.is_first():
                with _writing(self.directory):
                    self._write(self.session)
        except (CheckpointError, SessionError) as error:
            self.session = before
            raise SessionError(
                f"{error}; {before.saved:,} tokens are saved, the same command goes on there"
            ) from None

    def _refuse_foreign(self) -> None:
        """Refuses a directory that holds files which are not part of a session."""
        if not self.directory.exists():
            return
        names = sorted(path.name for path in self.directory.iterdir() if path.name != _LOCK)
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        if not foreign and not self._is_session():
            foreign = [name for name in names if not _PARTIAL.fullmatch(name)]
        foreign = foreign or list(map(str, self._foreign_in_windows()))
        if foreign:
            raise SessionError(
                f"{shown(self.directory)} holds {shown(foreign[0])}, which is no part of a KV "
                "session: name a directory of its own"
            )

    def _foreign_in_windows(self) -> Iterator[Path]:
        """Yields files inside windows that Orbax does not write, relative to the session."""
        from qwen_jax.storage import orbax_io

        for window in sorted(self.directory.glob("window_*")):
            if window.is_symlink():
                continue  # of which the link alone is removed
            if not window.is_dir():
                yield window.relative_to(self.directory)
            for path in sorted(window.rglob("*")):
                if not path.is_dir() and not orbax_io.wrote(path.relative_to(window).as_posix()):
                    yield path.relative_to(self.directory)

    def _is_session(self) -> bool:
        """Returns True if session.json is one of this program's, even a damaged one."""
        if not _is_missing(self.directory / _MANIFEST):
            return b'"format": "qwen-jax session' in _read(
                self.directory / _MANIFEST, limit=JSON_BYTES
            )
        return False

    def _there(self, identity: Identity, overwrite: bool) -> Session | None:
        """Returns the session to resume; None to begin a new one."""
        if not self._is_session():
            return None
        try:
            there = read(self.directory)
            different = there.identity.difference(identity)
            if different is not None:
                raise SessionError(
                    f"{self.directory} holds another session ({different}): name another "
                    "directory or --overwrite it"
                )
            if there.windows:
                read_tokens(self.directory, there)
                check(self.directory, there, share=False)
        except SessionError:
            if overwrite:
                return None
            raise
        return there if there.windows else None

    def _drop_rest(self) -> None:
        """Removes files of windows that session.json does not list, left by a killed run."""
        kept = {_MANIFEST, _TOKENS, _LOCK, *(window.name for window in self.session.windows)}
        for path in self.directory.iterdir():
            if path.name not in kept:
                _remove(path)

    def _seen(self, digest: str) -> Session:
        """Reads the session in a process other than the first; it must have the same checksum."""
        found = None
        with contextlib.suppress(SessionError):
            found = read(self.directory)
        if found is None or found.sha256 != digest:
            raise SessionError(_not_shared(self.directory))
        return found

    def _write(self, session: Session) -> None:
        atomic.write(self.directory / _MANIFEST, session.encode())


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turns an `OSError` into a `SessionError`."""
    try:
        yield
    except OSError as error:
        path = shown(error.filename or directory)
        raise SessionError(f"{path} cannot be written: {reason(error)}") from None


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """Turns a `CheckpointError` into a `SessionError`."""
    try:
        yield
    except CheckpointError as error:
        raise SessionError(str(error)) from None


def check_shared(directory: Path, session: Session) -> None:
    """Checks that all processes of a job see the same session.

    Raises:
        SessionError: in the processes whose session differs from that of the first.
    """
    if multihost.broadcast_json(lambda: session.sha256) != session.sha256:
        raise SessionError(_not_shared(directory))


def _not_shared(directory: Path) -> str:
    return (
        f"{directory} is not the same directory for all processes: name one on a file system "
        "that they share"
    )


def _is_sound(session: Session) -> bool:
    """Returns True if types, sizes and paths of a session are as this program writes them.

    A session can come from a stranger, who can compute checksums too, so numbers that decide
    about memory, and paths, are not trusted.
    """
    figures = session.sparse
    if figures is not None and figures.keys() != _FIGURES:
        return False
    if not all(-1e18 < figure < 1e18 for figure in (figures or {}).values()):
        return False
    if not _are_settings(session.identity.settings):
        return False
    at = 0
    for index, window in enumerate(session.windows):
        if window.name != f"window_{index:06d}" or window.start != at:
            return False
        spans = window.start < window.stop <= session.identity.num_tokens
        if not spans or window.stop - window.start > window.size:
            return False
        if any(
            name.split("/")[0] != window.name or ".." in name.split("/") for name in window.files
        ):
            return False
        at = window.stop
    return True


def _are_settings(settings: dict[str, Any]) -> bool:
    """Returns True if the settings that are displayed are valid; others are only compared."""
    sizes, original = settings["dca"], settings["dca_original"]
    if sizes is not None and not (
        len(sizes) == 2 and all(type(size) is int and 0 < size <= _MOST_TOKENS for size in sizes)
    ):
        return False
    return type(original) is int and isinstance(settings["sparse"], dict | None)


def _sums(directory: Path, folder: Path) -> dict[str, Any]:
    """Flushes a window's files to disk; returns their sizes and checksums as JSON."""
    from qwen_jax.storage import orbax_io

    with _writing(directory):
        files = orbax_io.flush(folder, folder.parent)
    return msgspec.to_builtins(files)


def _read(path: Path, *, limit: int) -> bytes:
    """Reads a file of a session; refuses a link.

    Raises:
        SessionError: if it is a link or larger than `limit` bytes, or cannot be read.
    """
    if path.is_symlink():
        raise SessionError(f"{shown(path)} is a link, not a regular file: remove it")
    return read_bytes(path, limit=limit, error=SessionError)


def _is_missing(path: Path) -> bool:
    """Returns True if a path, or a directory above it, does not exist."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
