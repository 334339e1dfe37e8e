"""Engines of a model that is a checksum of what the cache holds, and what they must answer."""

import math
from unittest import mock

import jax.numpy as jnp
import numpy as np

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.engine import data_parallel
from qwen_jax.engine.engine import Engine, EngineConfig
from support.fake_runner import VOCAB, FakeRunner, following
from support.random_models import smallest

ORIGINAL_LEN = 24
MAX_LEN = 48
MODEL = smallest(
    vocab_size=VOCAB, max_len=MAX_LEN, dual_chunk=ChunkGeometry(20, 4), original_len=ORIGINAL_LEN
)


TREE = {"x": jnp.zeros(1)}


def build(**fields):
    """An engine of three rows."""
    fields = {"max_len": MAX_LEN, "max_seqs": 3, "page": 4, "slices": (8, 2)} | fields
    return Engine(MODEL, TREE, EngineConfig(**fields), make_runner=FakeRunner)


def replicas(count, config, runner=FakeRunner):
    """Engines side by side, without a mesh."""
    with mock.patch.object(data_parallel, "split", lambda weights: [weights] * count):
        return data_parallel.Replicas(MODEL, TREE, config, make_runner=runner)


def scales(length, parity):
    factor = 1.0 if length <= ORIGINAL_LEN else 0.1 * math.log(length / ORIGINAL_LEN) + 1
    query, key = (factor, factor) if parity else (factor**2, 1.0)
    return float(np.float32(query)), float(np.float32(key))


def alone(request, parity, prefix=()):
    """The answer and the reason of its end, from the definition.

    What a prompt takes from outside has the scales of its own length.
    """
    prompt = request.prompt
    kept = len(prefix) if len(prompt) > len(prefix) and prompt[: len(prefix)] == prefix else 0
    history = [(token, *scales(kept, parity)) for token in prompt[:kept]]
    history += [(token, *scales(len(prompt), parity)) for token in prompt[kept:]]
    answer = []
    while True:
        token = following(history)
        if token == -1:
            return answer, "error"
        if token in request.eos_ids:
            return answer, "stop"
        answer.append(token)
        if len(answer) == request.max_new_tokens:
            return answer, "length"
        history.append((token, *scales(len(history) + 1, parity)))
