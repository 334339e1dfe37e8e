"""Log-probabilities of answers: PyTorch's, for those who ask, at no cost to others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_models

from qwen_jax.engine import sampler
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.request import MOST_LOGPROBS, Request, RequestError, Sampling

NAME = "4-2-heads-of-64-untied"
CONFIG = random_models.CONFIGS[NAME]
LIMIT = CONFIG.vocab_size - 9  # ids from here on are never sampled; they are among the likeliest
DRAWN = Sampling(temperature=1.5, top_k=30, repetition_penalty=1.4, seed=3)


@functools.cache
def weights():
    return random_models.weights(CONFIG)


def build():
    config = EngineConfig(max_len=160, max_seqs=4, page=16, slices=(32,), vocab_limit=LIMIT)
    return Engine(CONFIG, jax.tree.map(jnp.asarray, weights()), config)


@functools.cache
def engine():
    return build()


def request(length, logprobs, new=12, sampling=DRAWN):
    prompt = tuple(np.random.default_rng(length).integers(0, LIMIT, length).tolist())
    return Request(prompt=prompt, max_new_tokens=new, sampling=sampling, logprobs=logprobs)


def answers(serving, requests):
    """Tokens and log-probabilities of each request, all served at once."""
    found = {serving.add(each): ([], []) for each in requests}
    while serving.busy:
        for event in serving.step():
            assert event.error is None
            tokens, logprobs = found[event.request_id]
            tokens.extend(event.tokens)
            logprobs.extend(event.logprobs)
    return list(found.values())


@pytest.mark.torch
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN])
def test_logprobs_are_those_of_transformers(sampling):
    pytest.importorskip("torch")
    from support import huggingface

    reference = huggingface.build(CONFIG, weights())
    requests = [request(n, k, sampling=sampling) for n, k in ((70, 5), (9, 20), (40, 0), (33, 1))]
    limited = 0
    for each, (tokens, logprobs) in zip(requests, answers(engine(), requests), strict=True):
        assert len(tokens) == len(logprobs) == each.max_new_tokens
        logits = huggingface.logits(reference, (*each.prompt, *tokens))
        scores = logits[len(each.prompt) - 1 : -1].astype(np.float64)
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        for row, token, found in zip(scores, tokens, logprobs, strict=True):
            assert abs(found.logprob - row[token]) <= 1e-4
            ids = [token for token, _ in found.top]
            assert len(set(ids)) == len(ids) == each.logprobs
            values = np.array([value for _, value in found.top])
            np.testing.assert_allclose(values, row[ids], atol=1e-4)
            np.testing.assert_allclose(values, np.sort(row)[::-1][: len(ids)], atol=1e-4)
            limited += sum(token >= LIMIT for token in ids)
    assert limited > 0  # what may not be sampled has its probability all the same


def test_only_those_who_ask_get_logprobs_and_all_get_the_same_answers():
    asked = [request(n, k) for n, k in ((50, None), (20, 3), (60, None), (31, 0))]
    plain = [request(n, None) for n in (50, 20, 60, 31)]
    found = answers(engine(), asked)
    assert [tokens for tokens, _ in found] == engine().run(plain)
    for each, (tokens, logprobs) in zip(asked, found, strict=True):
        assert len(logprobs) == (0 if each.logprobs is None else len(tokens))


def test_an_end_of_sequence_has_no_logprobs():
    (tokens,) = engine().run([request(20, None)])
    ended = Request(
        prompt=request(20, None).prompt,
        max_new_tokens=12,
        sampling=DRAWN,
        eos_ids=(tokens[5],),
        logprobs=2,
    )
    ((got, logprobs),) = answers(engine(), [ended])
    assert got == tokens[: len(got)]
    assert len(got) == len(logprobs) <= 5


def test_two_programs_serve_all_who_ask_and_none_is_made_for_others():
    fresh = build()
    fresh.run([request(40, None)])
    plain = fresh.num_compilations
    assert plain == 4  # the seen tokens, prefill, sample, decode
    for logprobs in (0, 1, 7, MOST_LOGPROBS):
        fresh.run([request(40, logprobs), request(20, None)])
        assert fresh.num_compilations == plain + 2
    fresh.run([request(50, None)])
    assert fresh.num_compilations == plain + 2


def test_a_vocabulary_smaller_than_the_most_logprobs_is_given_whole():
    logits = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    found = jax.jit(sampler.logprobs, static_argnames="count")(
        logits, np.array([4, -1], np.int32), count=MOST_LOGPROBS
    )
    assert found.ids.shape == (2, 6)
    np.testing.assert_allclose(np.exp(found.top).sum(-1), 1, rtol=1e-6)
    assert found.sampled[0] == found.top[0, list(found.ids[0]).index(4)]


@pytest.mark.parametrize("value", [-1, MOST_LOGPROBS + 1, True, 2.0, "5"])
def test_bad_logprobs_are_refused_by_name(value):
    with pytest.raises(Exception, match="logprobs") as refused:
        request(5, value)
    if type(value) is int:
        assert refused.type is RequestError
        assert f"logprobs={value} must be an integer from 0 to 20" in str(refused.value)
