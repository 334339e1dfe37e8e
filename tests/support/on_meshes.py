"""A random model and where it lies: on a mesh, or on one device."""

import dataclasses

import jax

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.distributed import sharding
from qwen_jax.models import params
from support import random_models

CONFIG = dataclasses.replace(
    random_models.config(
        heads=(4, 2), head_dim=16, dual_chunk=ChunkGeometry(80, 16), original_len=64
    ),
    num_layers=3,
    mlp_dim=48,
    vocab_size=64,
)
PART = 16  # tokens of a page on each device


def mesh_of(text):
    """The mesh of the first devices, as `--mesh` names it."""
    shape = sharding.parse(text)
    return sharding.make_mesh(jax.devices()[: shape.size], **dataclasses.asdict(shape))


def place(config, tree, text):
    """Weights on a mesh, or on one device."""
    if not text:
        return jax.device_put(tree, jax.devices()[0])
    return jax.device_put(tree, params.shardings(config, mesh_of(text)))
