"""The numbers of a tiny engine, printed as one line of hexadecimal digits: run with settings."""

import dataclasses
import hashlib
import sys

import jax
import numpy as np

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import SparseConfig
from qwen_jax.engine.engine import Engine, EngineConfig, Piece
from qwen_jax.engine.request import Request, Sampling
from support import random_models

CONFIG = dataclasses.replace(
    random_models.config(
        3, heads=(2, 1), head_dim=16, dual_chunk=ChunkGeometry(40, 8), original_len=40
    ),
    num_layers=2,
)
BUDGETS = SparseConfig(vertical=((40, 40),) * 2, slash=((101, 101),) * 2, last_q=8, threshold=100)
REQUESTS = (
    Request(prompt=random_models.tokens(CONFIG, 130), max_new_tokens=3),
    Request(
        prompt=random_models.tokens(CONFIG, 29),
        max_new_tokens=3,
        sampling=Sampling(temperature=1.0, top_k=9, top_p=0.9, min_p=0.01, seed=3),
    ),
    Request(
        prompt=random_models.tokens(CONFIG, 3),
        max_new_tokens=3,
        sampling=Sampling(repetition_penalty=1.2),
    ),
)


def few_numbers(backend):
    """Bytes of the scores of a dense prompt and of what it is answered."""
    config = EngineConfig(max_len=48, max_seqs=2, page=16, slices=(32,), backend=backend)
    engine = Engine(CONFIG, jax.device_put(random_models.weights(CONFIG)), config)
    answers = engine.run(REQUESTS[1:])
    scores = engine.score(REQUESTS[1].prompt)
    return b"".join(each.tobytes() for each in (*scores, np.asarray(answers, np.int32)))


def numbers(backend):
    """Bytes of scores, keys, values and answers of dense and sparse prompts."""
    weights = jax.device_put(random_models.weights(CONFIG))
    config = EngineConfig(
        max_len=160,
        max_seqs=2,
        page=16,
        slices=(32,),
        sparse=BUDGETS,
        dense_tail=8,
        backend=backend,
        least_recall=0.2,
    )
    engine = Engine(CONFIG, weights, config)
    found = [*engine.score(REQUESTS[0].prompt), *engine.score(REQUESTS[1].prompt)]
    number = engine.add(REQUESTS[1])
    engine.step()
    window = engine.take(number, 0, 20)
    engine.cancel(number)
    engine.step()
    other = Engine(CONFIG, weights, dataclasses.replace(config, prefix_tokens=20))
    other.restore(REQUESTS[1].prompt[:20], [Piece(start=0, stop=20, load=lambda _: window)])
    answers = [*engine.run(REQUESTS), *other.run(REQUESTS)]
    assert answers[3] == answers[0]
    assert answers[4] == answers[1]
    found += [np.asarray(each)[:, :20] for each in window]
    found += [np.asarray(each, np.int32) for each in answers]
    return b"".join(np.ascontiguousarray(each).tobytes() for each in found)


if __name__ == "__main__":
    print(hashlib.sha256(numbers(sys.argv[1])).hexdigest())
