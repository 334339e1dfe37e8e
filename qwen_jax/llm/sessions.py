"""KV sessions of a model: identity, checks, restoring into an engine, prefilling."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.engine.request import Event, Request, RequestError, Sparseness
from qwen_jax.files import reading
from qwen_jax.llm import documents
from qwen_jax.llm.model import Model
from qwen_jax.llm.options import Options
from qwen_jax.storage import kv_session
from qwen_jax.storage.kv_session import Identity, Session, SessionError, Writer
from qwen_jax.storage.manifest import READ_FILES
from qwen_jax.text.tokenizer import Tokenizer

_OLDER_FILES = ("special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES = (
    *(name for name in READ_FILES if name.startswith(("tokenizer", "chat"))),
    *_OLDER_FILES,
)
_NEW = 2  # tokens of an answer that is not waited for: a request has one, and this one goes on
_SAID_BYTES = 1e9  # of weights that take seconds to read


def identity(opened: Model, tokens: tuple[int, ...], *, is_chat: bool) -> Identity:
    """Returns the identity of a prompt's session with this model and its options."""
    return _identity(
        opened,
        num_tokens=len(tokens),
        tokens_sha256=hashlib.sha256(kv_session.encode_tokens(tokens)).hexdigest(),
        is_chat=is_chat,
    )


def versions() -> dict[str, str]:
    """Returns the versions of the packages that write a session."""
    packages = ("qwen-jax", "jax", "orbax-checkpoint")
    return {name: importlib.metadata.version(name) for name in packages}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A session on disk that was checked and fits the model.

    Attributes:
        directory: directory of the session.
        session: content of its session.json.
        tokens: token ids of its prompt.
        stamp: stamp of its files before they were checked (`kv_session.stamp`); None if no other
            program can write them.
    """

    directory: Path
    session: Session
    tokens: tuple[int, ...]
    stamp: tuple | None = None

    @property
    def documents(self) -> list[tuple[str, int]]:
        """Names of the files in its prompt, with their numbers of tokens."""
        return list(self.session.documents)

    @property
    def window(self) -> int:
        """Length of its largest window in tokens."""
        return max((window.stop - window.start for window in self.session.windows), default=0)

    def question(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Returns ids that end the user's turn with a question and open the answer's turn."""
        return [*tokenizer.encode_text(text), *tokenizer.close_turn(), *tokenizer.open_answer()]

    def check_chat(self, options: Options) -> None:
        """Checks that a question can follow its prompt.

        Raises:
            ConfigError: if the prompt is raw text.
        """
        if not self.session.identity.is_chat:
            raise ConfigError(
                f"{self.directory} holds raw text, after which no question can follow: use "
                f"`generate`, or prefill with {options.spelled('files')}"
            )

    def restore(self, engine, say: Callable[[str], None] = lambda _: None) -> None:
        """Loads the session into an engine that has no restored prefix yet.

        Args:
            say: called with a line on size and time.

        Raises:
            SessionError: if its files cannot be read, or have changed since they were checked.
        """
        from qwen_jax.engine.engine import Piece

        began = time.monotonic()
        figures = self.session.sparse
        pieces = [
            Piece(
                start=window.start,
                stop=window.stop,
                load=functools.partial(kv_session.load, self.directory, self.session, window),
            )
            for window in self.session.windows
        ]
        tokens = self.tokens[: self.session.saved]
        engine.restore(tokens, pieces, None if figures is None else _sparseness(figures))
        if self.stamp not in (None, kv_session.stamp(self.directory, self.session)):
            raise SessionError(
                f"{self.directory} was changed while it was read: start again when no other "
                "program writes it"
            )
        size, seconds = self.session.num_bytes, time.monotonic() - began
        say(
            f"{self.directory}: {len(tokens):,} tokens from the disk, {size / 1e9:.3f} GB in "
            f"{seconds:.2f} s ({size / 1e9 / seconds:.2f} GB/s)"
        )


def open_kept(opened: Model, directory: Path) -> Kept:
    """A whole session of this model with these options; every byte of it is checked.

    Raises:
        SessionError: if it is damaged, not finished, or another model's.
    """
    found = kv_session.read(directory)
    here = _identity(
        opened,
        num_tokens=found.identity.num_tokens,
        tokens_sha256=found.identity.tokens_sha256,
        is_chat=found.identity.is_chat,
    )
    different = found.identity.difference(here)
    if different is not None:
        raise SessionError(
            f"{directory} was prefilled differently ({different}): use the model and the options "
            "that it was made with, or prefill again"
        )
    if not found.is_complete:
        raise SessionError(
            f"{directory} holds {found.saved:,} of {found.identity.num_tokens:,} tokens: the "
            "`qwen-jax prefill` that began it goes on there"
        )
    kv_session.check_shared(directory, found)
    stamp = kv_session.stamp(directory, found)
    tokens = kv_session.read_tokens(directory, found)
    kv_session.check(directory, found)
    return Kept(directory=directory, session=found, tokens=tokens, stamp=stamp)


def files_prompt(
    tokenizer: Tokenizer, texts: Sequence[documents.Document], system: str | None
) -> tuple[list[tuple[str, int]], tuple[int, ...]]:
    """Encodes files as the beginning of a user's turn, which a question can end.

    Args:
        system: system prompt instead of the checkpoint's own; None for that.

    Returns:
        Names of the files with their numbers of tokens, and the token ids.

    Raises:
        TokenizerError: if the checkpoint does not speak ChatML.
    """
    rows = [(each.name, len(tokenizer.encode_text(each.text))) for each in texts]
    text = documents.joined(texts, "")
    return rows, (*tokenizer.open_chat(system), *tokenizer.open_turn("user", text))


def check_mesh(opened: Model) -> None:
    """Refuses a mesh with replicas, before a prompt is read.

    Raises:
        ConfigError: if the mesh is malformed or has `data`.
    """
    from qwen_jax.distributed import sharding

    mesh = opened.options.mesh
    if mesh is not None and sharding.parse(mesh).data > 1:
        name = opened.options.spelled("mesh")
        raise ConfigError(f"{name} {mesh}: one prompt has no replicas: leave data out")


def fill(
    opened: Model,
    ids: tuple[int, ...],
    writer: Writer,
    save_every: int,
    show: Callable[[int, int], object],
    *,
    weights: Any = None,
    beside: Iterable[Any] = (),
) -> None:
    """Reads what a session does not hold yet, in an engine of its own, and saves it as it goes.

    Args:
        ids: the prompt.
        save_every: tokens after which a step saves.
        show: is told before and after each step the tokens read and those of the prompt.
        weights: what `Model.weights` gave; None to load them.
        beside: other engines of the model.

    Raises:
        KeyboardInterrupt, Preempted: from `show` or a step, after all that was read is saved.
        RequestError: if the model's numbers are not finite.
        SessionError: if the disk is full or fails.
    """
    from qwen_jax.engine.engine import Engine

    held = writer.session.saved
    there = Kept(directory=writer.directory, session=writer.session, tokens=ids)
    window = max(min(save_every, len(ids) - held), there.window)
    engine = opened.engine(
        len(ids) + _NEW, weights=weights, prefix_tokens=held, window=window, beside=beside
    )
    assert isinstance(engine, Engine)  # as `check_mesh` says
    if held:
        there.restore(engine, opened.options.say)
    number = engine.add(Request(prompt=ids, max_new_tokens=_NEW))
    last = Event(request_id=number, prefilled=held)

    def save() -> None:
        start, stop = writer.session.saved, last.prefilled
        if stop > start:
            keys, values = engine.take(number, start, stop)
            writer.add(stop, keys, values, last.sparse and dataclasses.asdict(last.sparse))

    try:
        show(held, len(ids))
        while last.prefilled < len(ids):
            for last in engine.step():
                if last.error is not None:
                    raise RequestError(last.error)
            if last.prefilled - writer.session.saved >= save_every:
                save()
            show(last.prefilled, len(ids))
    except (KeyboardInterrupt, multihost.Preempted) as stop:
        save()
        stopped = (
            f"stopped: {writer.session.saved:,} of {len(ids):,} tokens are saved, the same "
            "command goes on there"
        )
        if isinstance(stop, multihost.Preempted):
            raise multihost.Preempted(stopped) from None
        opened.options.say(stopped)
        raise
    save()


def tokenizer_fingerprint(directory: Path, names: tuple[str, ...] = TOKENIZER_FILES) -> str:
    """Returns a checksum, 16 hex digits, of the files that define the tokenizer."""
    digest = hashlib.sha256()
    for name in names:
        path, limit = directory / name, reading.JSON_BYTES
        if os.path.lexists(path):
            digest.update(reading.read_bytes(path, limit=limit, error=ConfigError))
        elif name not in _OLDER_FILES:
            digest.update(b"\0")
    return digest.hexdigest()[:16]


def weights_fingerprint(directory: Path, say: Callable[[str], None] = lambda _: None) -> str:
    """Returns a fingerprint of a model's weights, the same before and after conversion.

    Weights are read once, and again when they change, see `convert.sums`.

    Args:
        say: called with a line of text if many bytes have to be read.

    Raises:
        CheckpointError: if they are missing or damaged.
    """
    from convert import source, sums
    from qwen_jax.models import params

    said = False

    def progress(_: int, total: int) -> None:
        nonlocal said
        if not said and total > _SAID_BYTES:
            say(f"reading {total / 1e9:.1f} GB of weights once, for their checksums")
        said = True

    if not params.is_converted(directory):
        return source.check(directory).fingerprint(progress)
    manifest = params.read_manifest(directory)
    sums.check_parameters(directory, manifest, progress)
    return manifest.fingerprint


def _identity(opened: Model, *, num_tokens: int, tokens_sha256: str, is_chat: bool) -> Identity:
    config = opened.config
    opened.mesh()  # before anything asks for devices
    return Identity(
        weights=weights_fingerprint(opened.directory, opened.options.say),
        tokenizer=tokenizer_fingerprint(opened.directory),
        settings=_settings(opened, num_tokens),
        dtype=opened.precision()[0],
        shape=(config.num_layers, config.num_kv_heads, config.head_dim),
        num_tokens=num_tokens,
        tokens_sha256=tokens_sha256,
        is_chat=is_chat,
    )


def _sparseness(figures: Mapping[str, float]) -> Sparseness:
    whole = {name: int(figures[name]) for name in ("pairs", "tokens")}
    return Sparseness(**{**figures, **whole})


def _settings(opened: Model, num_tokens: int) -> dict[str, Any]:
    """Returns the settings of attention that affect a prompt of `num_tokens` tokens."""
    chosen = opened.settings()
    del chosen["model"], chosen["dtype"]  # the identity has both
    if opened.sparse is None or num_tokens <= opened.sparse.threshold:
        chosen["sparse"] = None
    return chosen
