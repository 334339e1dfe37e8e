"""Answers do not depend on how a prompt is cut into slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_models

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.engine.engine import Engine, EngineConfig

GEOMETRY = ChunkGeometry(chunk_size=40, local_size=12)
LENGTH = 4 * GEOMETRY.chunk_len + 5


def score(slices, page):
    config = random_models.config(3, dual_chunk=GEOMETRY, original_len=30)
    tree = jax.tree.map(jnp.asarray, random_models.weights(config))
    engine = Engine(config, tree, EngineConfig(max_len=128, slices=slices, page=page))
    return np.concatenate(list(engine.score(random_models.tokens(config, LENGTH))))


@pytest.mark.parametrize(
    ("slices", "page"), [((1,), 16), ((13,), 7), ((28,), 28), ((31, 8), 5), ((128,), 128)]
)
def test_logits_do_not_depend_on_slices_or_pages(slices, page):
    expected = score((64, 16), 32)
    assert np.abs(score(slices, page) - expected).max() <= 1e-5 * np.abs(expected).max()
