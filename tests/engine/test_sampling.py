"""Sampling: transformers' filters, exact probabilities, and rows that ignore each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qwen_jax.engine import sampler
from qwen_jax.engine.sampler import CANDIDATES, Rows

V = 400  # more than CANDIDATES, so that both ways to filter are taken
NO_FILTER = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0}

sample = jax.jit(sampler.sample, static_argnames="vocab_limit")
filtered = jax.jit(sampler.filtered)
penalised = jax.jit(sampler.penalised, static_argnames="vocab_limit")


def rows(*settings, seed=0, position=0):
    """A row for each dict of settings."""
    full = [NO_FILTER | each for each in settings]
    B = len(full)

    def column(name, dtype):
        return np.array([each[name] for each in full], dtype)

    return Rows(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p_complement=np.array([1 - each["top_p"] for each in full], np.float32),
        min_p=column("min_p", np.float32),
        penalty=column("penalty", np.float32),
        seed=np.broadcast_to(np.asarray(seed, np.uint32), (B,)),
        position=np.broadcast_to(np.asarray(position, np.int32), (B,)),
    )


def random_logits(rng, B, spread):
    return (spread * rng.standard_normal((B, V))).astype(np.float32)


def random_settings(rng):
    return {
        "temperature": float(np.float32(rng.choice([0.3, 0.7, 1.0, 1.7]))),
        "top_k": int(rng.choice([0, 1, 2, 20, CANDIDATES - 1, CANDIDATES, 200, V, 10**6])),
        "top_p": float(rng.choice([0.0, 0.1, 0.5, 0.8, 0.95, 0.999, 1.0])),
        "min_p": float(rng.choice([0.0, 0.02, 0.2, 1.0])),
    }


def transformers_scores(logits, settings):
    """The rows one at a time through transformers' own processors, in its order."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as lp

    out = []
    for row, each in zip(logits, settings, strict=True):
        scores = torch.tensor(row)[None]
        chain = [lp.TemperatureLogitsWarper(each["temperature"])]
        if each["top_k"]:
            chain.append(lp.TopKLogitsWarper(each["top_k"]))
        if each["top_p"] < 1:
            chain.append(lp.TopPLogitsWarper(each["top_p"]))
        if each["min_p"]:
            chain.append(lp.MinPLogitsWarper(each["min_p"]))
        for processor in chain:
            scores = processor(None, scores)
        out.append(scores[0].numpy())
    return np.stack(out)


def edge_mass(logits, each):
    """Returns the distance, in float64, of the nearest cumulative mass from the edge of top-p."""
    scores = np.sort(logits.astype(np.float64) / each["temperature"])
    if each["top_k"]:
        scores = scores[-each["top_k"] :]
    mass = np.cumsum(np.exp(scores - scores[-1]))
    return np.abs(mass / mass[-1] - (1 - each["top_p"]))[:-1].min(initial=1)


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.torch
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 20.0])
def test_filtered_probabilities_are_those_of_transformers(spread):
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(60):
        settings = [random_settings(rng) for _ in range(4)]
        logits = random_logits(rng, 4, spread)
        actual = softmax(np.asarray(filtered(logits, rows(*settings))))
        expected = softmax(transformers_scores(logits, settings))
        for row, each in enumerate(settings):
            # Rounding decides who is kept where a cumulated mass meets the edge.
            if edge_mass(logits[row], each) > 1e-6:
                np.testing.assert_array_equal(actual[row] > 0, expected[row] > 0, str(each))
                np.testing.assert_allclose(actual[row], expected[row], atol=2e-6)
                compared += 1
    assert compared >= 200


@pytest.mark.torch
def test_ties_at_the_edge_of_top_k_stay_as_in_transformers():
    rng = np.random.default_rng(1)
    for spread in (1, 3, 40):
        for _ in range(20):
            settings = [{**random_settings(rng), "top_p": 1.0} for _ in range(4)]
            logits = np.round(random_logits(rng, 4, spread))
            actual = np.asarray(filtered(logits, rows(*settings)))
            expected = transformers_scores(logits, settings)
            np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))


def test_ties_at_the_edge_of_top_p_stay():
    logits = np.full((2, V), -1e9, np.float32)
    logits[:, 10:14] = 1
    logits[:, 30] = 2
    kept = np.isfinite(np.asarray(filtered(logits, rows({"top_p": 0.5}, {"top_p": 0.3}))))
    assert np.flatnonzero(kept[0]).tolist() == [10, 11, 12, 13, 30]
    assert np.flatnonzero(kept[1]).tolist() == [30]


def test_more_ties_than_candidates_all_count_towards_top_p():
    logits = np.full((1, V), -1e9, np.float32)
    logits[0, :10] = 2
    logits[0, 50 : 50 + CANDIDATES + 80] = 1
    # Top-k keeps the ties, whose mass is 0.88 of what it keeps: top-p must keep one of them.
    kept = np.isfinite(np.asarray(filtered(logits, rows({"top_k": 20, "top_p": 0.15}))))
    assert kept.sum() == 10 + CANDIDATES + 80


@pytest.mark.torch
@pytest.mark.parametrize("penalty", [0.5, 1.05, 3.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(2)
    logits = random_logits(rng, 2, 3.0)
    ids = rng.integers(0, V, (2, 150))
    seen = np.zeros((2, V), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    actual = penalised(logits, rows({"penalty": penalty}, {"penalty": 1.0}), seen)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor(ids), torch.tensor(logits)).numpy()
    np.testing.assert_allclose(np.asarray(actual)[0], expected[0], rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(actual)[1], logits[1])


SETTINGS = (
    {"temperature": 0.0},
    {"temperature": 0.0, "penalty": 1.3},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "penalty": 1.05},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 0.9, "top_k": 250, "min_p": 0.01},
)


@pytest.mark.parametrize("spread", [0.5, 6.0])
def test_a_row_gets_the_same_token_alone_and_in_any_company(spread):
    rng = np.random.default_rng(3)
    B = len(SETTINGS)
    logits = random_logits(rng, B, spread)
    seen = rng.random((B, V)) < 0.3
    seeds, positions = np.arange(B) * 7, np.arange(B) + 100
    for shift in range(3):
        order = np.roll(np.arange(B), shift)
        together = sample(
            logits[order],
            rows(*(SETTINGS[i] for i in order), seed=seeds[order], position=positions[order]),
            seen[order],
        )
        for place, i in enumerate(order):
            alone = sample(
                logits[[i]],
                rows(SETTINGS[i], seed=seeds[i], position=positions[i]),
                seen[[i]],
            )
            assert int(together[place]) == int(alone[0]), SETTINGS[i]


def test_greedy_rows_take_the_best_token():
    rng = np.random.default_rng(4)
    logits = random_logits(rng, 3, 2.0)
    greedy, hot = {"temperature": 0.0, "top_k": 5}, {"temperature": 2.0}
    seen = np.ones((3, V), bool)
    for company in ((greedy, greedy, greedy), (greedy, hot, greedy)):
        token = np.asarray(sample(logits, rows(*company), seen))
        best = logits.argmax(-1)
        assert token[0] == best[0]
        assert token[2] == best[2]


@pytest.mark.parametrize(
    "each",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.1},
    ],
)
def test_tokens_are_drawn_with_their_filtered_probabilities(each):
    B, calls = 500, 20
    logits = random_logits(np.random.default_rng(5), 1, 1.5)
    probabilities = softmax(np.asarray(filtered(logits, rows(each)), np.float64))[0]
    batch, seen = np.broadcast_to(logits, (B, V)), np.zeros((B, V), bool)
    numbers = np.arange(calls * B).reshape(calls, B)
    for streams in ({"seed": numbers}, {"position": numbers}):
        counts = np.zeros(V)
        for call in range(calls):
            stream = {name: values[call] for name, values in streams.items()}
            tokens = np.asarray(sample(batch, rows(*[each] * B, **stream), seen))
            counts += np.bincount(tokens, minlength=V)
        assert counts[probabilities == 0].sum() == 0
        expected = probabilities * numbers.size
        common = expected >= 5  # the rest together are one more bin, if they are anything
        observed = np.append(counts[common], counts[~common].sum())
        expected = np.append(expected[common], expected[~common].sum())
        some = expected > 0
        assert stats.chisquare(observed[some], expected[some]).pvalue > 1e-3


def test_ids_beyond_the_tokenizer_are_never_chosen():
    logits = np.zeros((3, V), np.float32)
    logits[0, 390:] = 50
    logits[1, 390:] = np.inf
    logits[2, 390:] = np.nan
    for each in ({"temperature": 0.0}, {"temperature": 5.0}, {"top_k": 3}, {"top_p": 0.5}):
        token = np.asarray(sample(logits, rows(each, each, each), logits > 9, vocab_limit=390))
        assert ((token >= 0) & (token < 390)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_told_and_spare_the_others(bad):
    logits = random_logits(np.random.default_rng(6), 3, 2.0)
    clean = logits.copy()
    logits[1, 7] = bad
    seen = np.zeros((3, V), bool)
    for each in SETTINGS:
        settings = rows(each, each, each)
        actual = np.asarray(sample(logits, settings, seen))
        expected = np.asarray(sample(clean, settings, seen))
        assert actual[1] == -1
        assert actual[0] == expected[0]
        assert actual[2] == expected[2]


def test_logits_without_any_choice_are_told():
    seen = np.zeros((1, V), bool)
    assert int(sample(np.full((1, V), -np.inf, np.float32), rows({}), seen)[0]) == -1


def test_a_greedy_step_sorts_nothing():
    seen = jnp.zeros((2, V), bool)
    jaxpr = jax.make_jaxpr(sampler.sample)(jnp.zeros((2, V)), rows({}, {}), seen)
    outside_branches = {equation.primitive.name for equation in jaxpr.eqns}
    assert "cond" in outside_branches
    assert not outside_branches & {"sort", "top_k", "cumsum", "random_bits"}
