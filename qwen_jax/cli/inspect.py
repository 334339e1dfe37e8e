"""The commands inspect and verify."""

import functools
import json
from pathlib import Path
from typing import Annotated

import typer

from convert import source
from convert.describe import describe
from convert.terminal import show, shown
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.files import reading
from qwen_jax.models import params

Checkpoint = Annotated[
    Path, typer.Argument(metavar="PATH", help="Converted checkpoint or Hugging Face directory.")
]


def inspect(
    path: Checkpoint,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, tensors included.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors too.")] = False,
    grep: Annotated[
        str, typer.Option(help="List only tensors whose name contains this text.")
    ] = "",
) -> None:
    """Describe a checkpoint from its headers, without reading weights."""
    found = describe(path)
    found["tensors"] = [row for row in found["tensors"] if grep in row["name"]]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    geometry = found["dual_chunk"]
    config = found["config"]
    sizes = ", ".join(f"{size / 1e9:.3f} GB {dtype}" for dtype, size in found["bytes"].items())
    rows = {
        "kind": found["kind"],
        "parameters": f"{found['num_parameters']:,}",
        "weights": sizes,
        "layers": f"{config['num_layers']}, width {config['embed_dim']}, mlp {config['mlp_dim']}",
        "heads": f"{config['num_heads']} query, {config['num_kv_heads']} key/value, "
        f"size {config['head_dim']}",
        "vocabulary": f"{config['vocab_size']}" + ", tied" * config["tie_embeddings"],
        "longest": f"{config['max_len']:,} tokens",
        "dual chunk": "none: plain rotary attention"
        if geometry is None
        else f"chunk {geometry['chunk_size']:,}, local {geometry['local_size']:,}, "
        f"original {config['original_len']:,}",
        "sparse": "budgets present" if found["sparse_budgets"] else "no budgets",
        "checksums": found["checksums"],
    }
    show(list(rows.items()))
    if tensors or grep:
        header = ("tensor", "shape", "dtype", "bytes", "where")
        listing = [
            (
                row["name"],
                str(row["shape"]),
                row["dtype"],
                f"{row['bytes']:,}",
                row.get("shard") or f"{row['part']}: {row['path']}",
            )
            for row in found["tensors"]
        ]
        print()
        show([header, *listing], right=(3,))


@functools.partial(expand_on_hosts, devices=False)
def verify(
    path: Checkpoint,
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte and compare every SHA-256 sum.")
    ] = False,
) -> None:
    """Check that a checkpoint is whole.

    Without --full: sizes, headers and the sums of small files. A Hugging Face
    directory carries no sums, unless it lies in a Hugging Face cache. Several
    processes share the files of --full.
    """
    with shown("verify") as progress:
        if params.is_converted(path):
            manifest = params.verify(path, full=full, progress=progress)
            what = "every file and tensor" if full else "sizes and small files (--full reads all)"
            size = manifest.num_bytes
        else:
            checked = source.check(path)
            summed = source.verify_blobs(checked, progress) if full else 0
            what = f"headers, and the sums of {summed} of {len(checked.shards)} weight files"
            size = checked.num_bytes
    print(reading.shown(f"{path} is intact: {what}, {size / 1e9:.2f} GB"))
