"""Content of tests/golden, for the script that writes it and the test that reads it."""

import hashlib
from pathlib import Path

import jax
import numpy as np

from support import random_models

FOLDER = Path(__file__).parents[1] / "golden"
TINY_PATH = FOLDER / "pytorch_tiny.npz"
DEMO_PATH = FOLDER / "pytorch_demo.npz"
STEPS = 64
DECIDED = 1e-3
"""Least lead of a chosen token: a nearer tie could be turned by rounding alone."""

TINY = tuple(random_models.CONFIGS)[::9]
TINY_LENGTH = 100
TINY_PROMPT = 40
DEMO_LENGTH = 2000
DEMO_PROMPT = 250
_COLUMNS = 40


def summary(logits: np.ndarray) -> dict[str, np.ndarray]:
    """Some columns, and figures to which every column contributes, of logits [T, V]."""
    rng = np.random.default_rng(0)
    columns = np.sort(rng.choice(logits.shape[1], _COLUMNS, replace=False))
    top = logits.max(-1)
    tail = np.exp(logits - top[:, None], dtype=np.float64).sum(-1)
    return {
        "columns": logits[:, columns],
        "top": top,
        "log_sum_exp": (top + np.log(tail)).astype(np.float32),
    }


def fingerprint(weights: dict) -> str:
    """Tells whether numpy still draws the weights that were recorded."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(weights):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
