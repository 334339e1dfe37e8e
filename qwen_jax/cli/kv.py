"""kv: look at KV sessions."""

import json
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from convert.terminal import show, shown
from qwen_jax.cli import command
from qwen_jax.cli.flags import Json
from qwen_jax.files import reading
from qwen_jax.storage import kv_session
from qwen_jax.storage.kv_session import Session, SessionError
from qwen_jax.storage.manifest import counter

app = command.App("Look at what `prefill` keeps.")

Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="A session that `prefill --out` has made.", show_default=False
    ),
]


@app.verb("inspect")
def inspect(directory: Directory, json_output: Json = False):
    """Describe a KV session, and the model and options that it fits.

    Reads session.json alone; `kv verify` reads the rest.

    Examples:
        qwen-jax kv inspect kv/book
    """
    found = kv_session.read(directory)
    identity = found.identity
    if json_output:
        body = msgspec.to_builtins(found) | {
            "saved": found.saved,
            "complete": found.is_complete,
            "bytes": found.num_bytes,
        }
        print(json.dumps(body, indent=2))
        return
    layers, heads, head_dim = identity.shape
    settings = identity.settings
    dca, sparse = settings.get("dca"), settings.get("sparse")
    rows = {
        "tokens": f"{found.saved:,}"
        + ("" if found.is_complete else f" of {identity.num_tokens:,}: not finished"),
        "files": ", ".join(f"{name} ({count:,} tokens)" for name, count in found.documents)
        or "raw text or token ids",
        "use with": "ask, chat, generate, batch" if identity.is_chat else "generate, batch",
        "size": f"{found.num_bytes / 1e9:.3f} GB in {len(found.windows)} windows",
        "arrays": f"{identity.dtype}, {layers} layers, {heads} key/value heads of {head_dim}",
        "weights": identity.weights,
        "tokenizer": identity.tokenizer,
        "dual chunk": "none: plain rotary attention"
        if dca is None
        else f"chunk {dca[0]:,}, local {dca[1]:,}, original {settings.get('dca_original'):,}",
        "prefill": "dense" if sparse is None else _sparse(found, sparse),
        "written by": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
    }
    show(list(rows.items()))


@app.verb("verify")
def verify(directory: Directory):
    """Check every byte of a KV session against its checksums.

    `ask --kv` and others do the same before they use one.

    Examples:
        qwen-jax kv verify kv/book
    """
    import jax

    found = kv_session.read(directory)
    kv_session.read_tokens(directory, found)
    with shown("verify") as progress:
        on_bytes = counter(progress, found.num_bytes)
        kv_session.check(directory, found, on_bytes=on_bytes)
    jax.config.update("jax_platforms", "cpu")  # other programs may use the accelerators
    kv_session.check_arrays(directory, found)
    if not found.is_complete:
        raise SessionError(
            f"{directory} is intact but not finished: {found.saved:,} of "
            f"{found.identity.num_tokens:,} tokens; the `qwen-jax prefill` that began it goes on "
            "there"
        )
    size = f"{found.num_bytes / 1e9:.3f} GB"
    print(f"{reading.shown(directory)} is intact: {found.saved:,} tokens, {size}")


def _sparse(found: Session, settings: dict) -> str:
    figures = found.sparse or {}
    density, recall = figures.get("density", 0.0), figures.get("recall", 0.0)
    return (
        f"sparse: {density:.1%} of the attention computed, recall {recall:.3f}, budgets "
        f"{settings.get('sha256')}"
    )
