"""Description of a checkpoint directory, read from headers only."""

import collections
import dataclasses
import os
from typing import Any

from convert import source
from qwen_jax.models import params
from qwen_jax.models.configs import model_config, sparse_config
from qwen_jax.storage import hub
from qwen_jax.storage.manifest import DTYPES


def describe(directory: str | os.PathLike) -> dict[str, Any]:
    """Describe a converted checkpoint or a Hugging Face directory as plain data.

    Keys: kind, config, dual_chunk, sparse_budgets, num_parameters, bytes (by dtype),
    checksums, tensors (name, shape, dtype, bytes, and, if converted, part and path).

    Raises:
        CheckpointError: if a header or the manifest is damaged.
        qwen_jax.config.ConfigError: if config.json cannot be used.
    """
    directory = hub.checkpoint(directory)
    if params.is_converted(directory):
        kind = "converted"
        manifest = params.verify(directory)
        checksums = "SHA-256 of every file and tensor; sizes and small files are intact"
        tensors = [
            {
                "name": tensor.name,
                "shape": list(tensor.source_shape),
                "dtype": tensor.dtype,
                "bytes": tensor.num_bytes,
                "part": tensor.part,
                "path": ".".join(tensor.path),
            }
            for tensor in manifest.tensors
        ]
    else:
        kind = "huggingface"
        checked = source.check(directory)
        checksums = "none: headers are intact"
        tensors = [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "bytes": tensor.size,
                "shard": tensor.shard,
            }
            for tensor in checked.tensors.values()
        ]
    config = model_config(directory)
    sizes: dict[str, int] = collections.Counter()
    for tensor in tensors:
        sizes[tensor["dtype"]] += tensor["bytes"]
    fields = dataclasses.asdict(config)
    del fields["vocab_padding"]  # of devices, not of a file
    dual_chunk = fields.pop("dual_chunk")
    return {
        "kind": kind,
        "config": fields,
        "dual_chunk": dual_chunk,
        "sparse_budgets": sparse_config(directory, config) is not None,
        "num_parameters": sum(size // DTYPES[dtype].itemsize for dtype, size in sizes.items()),
        "bytes": dict(sizes),
        "checksums": checksums,
        "tensors": tensors,
    }
