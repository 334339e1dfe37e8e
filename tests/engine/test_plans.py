"""The engine's surveys and plans of a text, against its own sparse prefill and the definition."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import definition, random_models, sparse_definition

from pallas_kernels import plan as plans
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import ConfigError, SparseConfig
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.request import Request, RequestError
from qwen_jax.sparse.recall import Grid

# The last slice has 16 tokens: all of them are rows of the report, each equally often
# of the survey.
PAGE, SLICE, LENGTH = 32, 64, 272
PIECES = [(start, min(SLICE, LENGTH - start)) for start in range(0, LENGTH, SLICE)]
GRID = Grid(vertical=(40, 70, 300), slash=(100, 103, 180), last_q=16, tiles=Tiles(q=1024, k=64))
PLACES = ((0, 0), (0, 1), (1, 0), (1, 2))  # budgets of each head in the grid
MODEL = dataclasses.replace(
    random_models.config(3, dual_chunk=ChunkGeometry(144, 16)), num_layers=3
)
BUDGETS = SparseConfig(
    vertical=3 * (tuple(GRID.vertical[v] for v, _ in PLACES),),
    slash=3 * (tuple(GRID.slash[s] for _, s in PLACES),),
    threshold=0,
    last_q=GRID.last_q,
)
TOKENS = random_models.tokens(MODEL, LENGTH)


@functools.cache
def weights(model=MODEL):
    return jax.device_put(random_models.weights(model), jax.devices()[0])


def build(model=MODEL, **fields):
    sizes = {"max_len": 400, "page": PAGE, "slices": (SLICE,), "sparse": BUDGETS}
    sizes["backend"] = "reference"  # which compiles sooner
    return Engine(model, weights(model), EngineConfig(**(sizes | fields)))


@functools.cache
def engine():
    return build()


@functools.cache
def planned(head):
    return list(engine().plans(TOKENS, 1, head))


def test_a_survey_foretells_the_first_layer_of_a_sparse_prefill():
    """Later layers see what earlier ones found, which a dense prefill cannot know."""
    surveys = list(engine().survey(TOKENS, GRID))
    assert [piece[:2] for piece in surveys] == PIECES
    for (_, _, survey), (_, _, _, report) in zip(surveys, planned(0), strict=True):
        assert survey.recall().shape == (3, 4, 3, 3)
        foretold = [survey.density()[0, n, v, s] for n, (v, s) in enumerate(PLACES)]
        np.testing.assert_allclose(report.density[0], foretold, rtol=1e-6)
    foretold = [survey.recall()[0, n, v, s] for n, (v, s) in enumerate(PLACES)]
    np.testing.assert_allclose(report.recall[0], foretold, atol=1e-5)
    for figures in (report.density[0, :3], report.recall[0, :3]):
        assert (figures < 1 - 1e-3).all()


def test_plans_read_what_the_definition_selects():
    tiles = Tiles(q=SLICE, k=PAGE)
    reads = sparse_definition.Reads(MODEL, PIECES, BUDGETS, MODEL.temperature(LENGTH) ** 2, tiles)
    expected = {}

    def read(layer, q, k):
        expected[layer] = reads(layer, q, k)
        return expected[layer]

    definition.logits(MODEL, weights(), TOKENS, MODEL.temperature(LENGTH) ** 2, read=read)
    assert reads.closest > 1e-5  # else rounding could choose otherwise
    for head in (0, 1):
        for start, length, plan, _ in planned(head):
            assert plan.tiles == tiles
            mask = plans.to_mask(plan, jnp.int32(start), jnp.int32(length), num_keys=LENGTH)
            rows = slice(start, start + length)
            causal = np.tril(np.ones((LENGTH, LENGTH), bool))[rows]
            np.testing.assert_array_equal(mask[0, :length], expected[1][head, rows] & causal)


def test_an_observer_learns_what_each_slice_of_a_sparse_prefill_found():
    steps = []

    @contextlib.contextmanager
    def observe(step):
        yield
        steps.append(step)

    engine().observe(observe)
    number = engine().add(Request(prompt=TOKENS, max_new_tokens=1))
    sparse = [engine().step()[0].sparse for _ in range(4)][-1]
    engine().observe(None)
    engine().cancel(number)
    engine().step()
    assert [step.kind for step in steps] == ["prefill_sparse"] * 4
    assert [(step.start, step.tokens) for step in steps] == [*PIECES[:3], (192, 16)]  # dense_tail
    for name, weights in (
        ("density", [step.tokens * (2 * step.start + step.tokens + 1) for step in steps]),
        ("recall", [step.tokens for step in steps]),
    ):
        found = [getattr(step, name) for step in steps]
        assert 0 < min(found) < 1
        assert np.average(found, weights=weights) == pytest.approx(getattr(sparse, name))


@pytest.mark.parametrize("iterate", [list, next], ids=["to the end", "abandoned"])
@pytest.mark.parametrize("kind", ["survey", "plans"])
def test_pages_are_given_back(kind, iterate):
    pages = engine().pages
    assert pages.used == 0
    begun = engine().survey(TOKENS, GRID) if kind == "survey" else engine().plans(TOKENS, 1, 0)
    assert pages.used == 0
    next(begun)
    assert pages.used == -(-LENGTH // PAGE)
    iterate(begun)
    del begun
    assert pages.used == 0


def test_what_cannot_be_planned_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"layer=2 must be from 0 to 1"):
        engine().plans(TOKENS, 2, 0)
    with pytest.raises(ConfigError, match=r"layer=-1 must be"):
        engine().plans(TOKENS, -1, 0)
    with pytest.raises(ConfigError, match=r"head=4 must be from 0 to 3"):
        engine().plans(TOKENS, 0, 4)
    one = dataclasses.replace(MODEL, num_layers=1)
    with pytest.raises(ConfigError, match="a model of one layer is prefilled densely"):
        build(one).plans(TOKENS, 0, 0)
    with pytest.raises(ConfigError, match="plans need budgets"):
        build(sparse=None).plans(TOKENS, 1, 0)
    for call in (lambda ids: engine().survey(ids, GRID), lambda ids: engine().plans(ids, 0, 0)):
        with pytest.raises(RequestError, match="tokens"):
            call((1, MODEL.vocab_size))
        with pytest.raises(RequestError, match="do not fit"):
            call(500 * (1,))
