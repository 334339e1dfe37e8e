"""Parameters as a tree: abstract(config), save, load. The only file that knows the checkpoint."""

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_jax.config import ModelConfig
from qwen_jax.model import Qwen2


def abstract(config: ModelConfig, dtype=jnp.bfloat16) -> dict:
    """The parameter tree of a model without its values: nested dicts of ShapeDtypeStruct."""
    model = nnx.eval_shape(lambda: Qwen2(config, key=jax.random.key(0), dtype=dtype))
    return nnx.to_pure_dict(nnx.state(model))


def count(tree) -> int:
    """Numbers in all leaves of a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
