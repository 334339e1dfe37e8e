"""Sparse prefill of a whole model."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import definition, random_models, sparse_definition

from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import SparseConfig
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.model_runner import Runner
from qwen_jax.engine.request import Request
from qwen_jax.models import kv_cache, rope
from qwen_jax.models.families.qwen2 import Qwen2
from qwen_jax.models.steps import PrefillStep
from qwen_jax.sparse import budgets as sparse

GEOMETRY = ChunkGeometry(chunk_size=144, local_size=16)
SOME = [pytest.param(None, marks=pytest.mark.long), GEOMETRY]
SLICE, PAGE, LENGTH = 64, 32, 300
EVERYTHING = 10**6
QUERY_SCALE = 1.2
TILES = Tiles(q=16, k=PAGE)


@functools.cache
def model(geometry):
    config = dataclasses.replace(random_models.config(3, dual_chunk=geometry), num_layers=3)
    tree = jax.tree.map(jnp.asarray, random_models.weights(config))
    return config, tree


def budgets_of(config, vertical, slash, threshold=0):
    # The last layer reads densely; its budget gives all of these one program.
    rows = (config.num_layers - 1) * (vertical,) + (LENGTH,)
    return SparseConfig(
        vertical=tuple((row,) * config.num_heads for row in rows),
        slash=config.num_layers * ((slash,) * config.num_heads,),
        threshold=threshold,
    )


def pieces(edges):
    """First position and length of the slices that begin at `edges`."""
    return [(a, b - a) for a, b in itertools.pairwise((*edges, LENGTH))]


@functools.cache
def program(geometry, backend):
    config, tree = model(geometry)
    module = nnx.eval_shape(lambda: Qwen2(config, key=jax.random.key(0), dtype=jnp.float32))
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, tree)

    def run(state, cache, step, rotary, budgets):
        module = nnx.merge(graph, state)
        if budgets is None:
            return *module.prefill(cache, step, rotary, backend=backend), None
        return module.prefill_sparse(cache, step, rotary, budgets, backend=backend)

    return functools.partial(jax.jit(run), state)


def prefill(
    geometry, budgets=None, *, backend=None, least_recall=0.0, seed=0, edges=range(0, LENGTH, SLICE)
):
    """Logits after a prompt that is read in slices, and the reports of these.

    Args:
        budgets: columns and diagonals of every head, or a configuration.
        edges: where slices begin.
    """
    config, _ = model(geometry)
    rotary = rope.table(config, LENGTH)
    cache = kv_cache.init(config, LENGTH // PAGE + 2, PAGE, jnp.float32)
    tokens = np.zeros(LENGTH + SLICE, np.int32)
    tokens[:LENGTH] = random_models.tokens(config, LENGTH, seed)
    if isinstance(budgets, tuple):
        budgets = budgets_of(config, *budgets)
    if budgets is not None:
        budgets = sparse.budgets(budgets, least_recall=least_recall, tiles=TILES)
    reports = []
    for start, length in pieces(edges):
        step = PrefillStep(
            tokens=jnp.asarray(tokens[start : start + SLICE]),
            start=jnp.int32(start),
            length=jnp.int32(length),
            page_table=jnp.arange(1, LENGTH // PAGE + 2, dtype=jnp.int32),
            query_scale=jnp.float32(QUERY_SCALE),
            key_scale=jnp.float32(1),
        )
        logits, cache, report = program(geometry, backend)(cache, step, rotary, budgets)
        reports.append(report)
    return np.asarray(logits), reports


@pytest.mark.parametrize("geometry", SOME)
def test_budgets_for_everything_give_what_dense_prefill_gives(geometry):
    dense, _ = prefill(geometry)
    actual, reports = prefill(geometry, (LENGTH, EVERYTHING))
    assert np.abs(actual - dense).max() <= 1e-4
    for report in reports:
        np.testing.assert_array_equal(report.density, 1)
        np.testing.assert_allclose(report.recall, 1, atol=1e-5)


@pytest.mark.parametrize("geometry", SOME)
def test_the_blockwise_backend_equals_the_quadratic_one_slice_by_slice(geometry):
    actual, reports = prefill(geometry, (40, 101))
    expected, expected_reports = prefill(geometry, (40, 101), backend="reference")
    assert np.abs(actual - expected).max() <= 1e-4
    dense, _ = prefill(geometry)
    assert np.abs(actual - dense).max() > 1e-3  # else this would prove nothing
    for report, wanted in zip(reports, expected_reports, strict=True):
        np.testing.assert_allclose(report.density, wanted.density, rtol=1e-6)
        np.testing.assert_allclose(report.recall, wanted.recall, atol=1e-4)
    last = reports[-1]
    assert last.density.shape == (2, 4)  # the last layer reads one token, densely
    assert ((last.density > 0) & (last.density < 1)).all()
    assert ((last.recall > 0) & (last.recall < 1)).all()


def test_heads_that_recall_too_little_are_computed_densely():
    dense, _ = prefill(GEOMETRY)
    actual, reports = prefill(GEOMETRY, (40, 101), least_recall=1.0 + 1e-3)
    assert np.abs(actual - dense).max() <= 1e-4
    for report in reports:
        np.testing.assert_array_equal(report.density, 1)
        np.testing.assert_array_equal(report.recall, 1)
    _, free = prefill(GEOMETRY, (40, 101))
    bound = float(np.median(free[-1].recall[0]))
    _, guarded = prefill(GEOMETRY, (40, 101), least_recall=bound)
    poor = np.asarray(free[-1].recall[0]) < bound
    assert poor.any()
    np.testing.assert_array_equal(np.asarray(guarded[-1].density[0]) == 1, poor)


def test_votes_are_rotated_to_the_critical_positions():
    geometry = ChunkGeometry(chunk_size=8, local_size=2)
    config, _ = model(geometry)
    long = rope.table(dataclasses.replace(config, dual_chunk=None), 64)
    positions = jnp.arange(20)
    actual = rope.selection_angles(config, rope.table(config, 20), positions)
    r = np.arange(20) % 6
    for view, offset in enumerate((0, 6, 8)):
        expected = long.at(jnp.asarray(r + offset))
        np.testing.assert_allclose(actual.cos[view], expected.cos, atol=1e-6)
        np.testing.assert_allclose(actual.sin[view], expected.sin, atol=1e-6)


def test_the_original_budget_of_thirty_columns_means_130():
    config = SparseConfig(vertical=((30, 31),), slash=((30, 31),))
    found = sparse.budgets(config)
    assert found.vertical.tolist() == [[130, 31]]
    assert found.slash.tolist() == [[30, 31]]
    assert found.num_columns == 130
    assert sparse.budgets(config, num_keys=96).num_columns == 96


def test_the_engine_is_sparse_over_the_threshold_and_shares_pages_within_a_kind():
    config, tree = model(GEOMETRY)
    settings = EngineConfig(
        max_len=512,
        page=PAGE,
        slices=(SLICE,),
        sparse=budgets_of(config, 40, 101, threshold=200),
        dense_tail=0,
        backend="reference",  # which compiles sooner
    )
    engine = Engine(config, tree, settings)
    prompt = random_models.tokens(config, LENGTH)

    def ask(length):
        before = engine.num_prefilled
        number = engine.add(Request(prompt=prompt[:length], max_new_tokens=4))
        events = []
        while engine.busy:
            events += [event for event in engine.step() if event.request_id == number]
        return events[-1].sparse, engine.num_prefilled - before

    assert ask(200) == (None, 200)
    found, computed = ask(LENGTH)
    assert computed == LENGTH  # nothing of the dense prompt, which begins alike
    assert 0 < found.density < 1
    assert 0 < found.least_recall < found.recall < 1
    assert found.pairs == LENGTH * (LENGTH + 1) // 2
    again, computed = ask(LENGTH)
    assert computed == LENGTH % PAGE
    assert again.tokens == computed


@pytest.mark.parametrize("geometry", [None, GEOMETRY])
def test_logits_equal_the_definition_that_selects_for_itself(geometry):
    """Slices of odd lengths and at both ends of chunks; each head has budgets of its own."""
    config, tree = model(geometry)
    rng = np.random.default_rng(5)
    shape = config.num_layers, config.num_heads
    vertical, slash = rng.integers(35, 60, shape), rng.integers(101, 111, shape)
    vertical[-1] = LENGTH
    budgets = SparseConfig(
        vertical=tuple(map(tuple, vertical.tolist())), slash=tuple(map(tuple, slash.tolist()))
    )
    edges = (0, 64, 113, 128, 129, 192, 256)
    seed = 0 if geometry is None else 3
    read = sparse_definition.Reads(config, pieces(edges), budgets, QUERY_SCALE, TILES)
    tokens = random_models.tokens(config, LENGTH, seed)
    expected = definition.logits(config, tree, tokens, QUERY_SCALE, read=read)[-1]
    assert read.closest > 1e-5  # else rounding could choose otherwise
    actual, reports = prefill(geometry, budgets, seed=seed, edges=edges)
    assert np.abs(actual - expected).max() <= 1e-4
    dense, _ = prefill(geometry, seed=seed)
    assert np.abs(dense - expected).max() > 1e-2
    assert len(reports) == len(edges)


@pytest.mark.parametrize("tail", [1, 50, LENGTH])
def test_the_engine_reads_the_end_of_a_prompt_densely(tail):
    config, tree = model(GEOMETRY)
    budgets = budgets_of(config, 40, 101)
    settings = EngineConfig(
        max_len=LENGTH + 1,
        page=PAGE,
        slices=(SLICE,),
        sparse=budgets,
        dense_tail=tail,
        backend="reference",  # which compiles sooner
    )
    seen = []

    class Seen(Runner):
        def sample(self, logits, choice):
            seen.append(logits)
            return super().sample(logits, choice)

    engine = Engine(config, tree, settings, make_runner=Seen)
    edges = [*range(0, LENGTH - tail, SLICE), LENGTH - tail]
    scale = config.temperature(LENGTH) ** 2
    read = sparse_definition.Reads(
        config,
        [(a, b - a) for a, b in itertools.pairwise(edges)],
        budgets,
        scale,
        Tiles(q=SLICE, k=PAGE),
    )
    tokens = random_models.tokens(config, LENGTH)
    expected = definition.logits(config, tree, tokens, scale, read=read)
    engine.add(Request(prompt=tokens, max_new_tokens=1))
    events = []
    while engine.busy:
        events += engine.step()
    assert np.abs(np.asarray(seen[-1]) - expected[-1]).max() <= 1e-4

    # Scores are those of this prompt, of all its tokens or the last.
    scores = np.concatenate([*engine.score(tokens)])
    assert np.abs(scores - expected).max() <= 1e-4
    ends = [event.prefilled - 1 for event in events]
    np.testing.assert_allclose(scores[ends], np.stack(seen), atol=1e-5)
    for last in 1, 60, 140:
        part = np.concatenate([*engine.score(tokens, last=last)])
        np.testing.assert_allclose(part, scores[-last:], atol=1e-5)
    assert (events[-1].sparse.density == 1) == (tail == LENGTH)
    assert events[-1].sparse.tokens == LENGTH


def test_more_budget_never_finds_less_in_the_first_layer():
    """Deeper layers of different budgets see different inputs."""
    growing = (40, 100), (50, 110), (100, 150), (200, 240)
    found = [prefill(GEOMETRY, budgets)[1] for budgets in growing]
    for reports in zip(*found, strict=True):
        for field in ("recall", "density"):
            values = np.stack([getattr(report, field) for report in reports])
            assert ((values > 0) & (values <= 1 + 1e-6)).all()
            assert (np.diff(values[:, 0], axis=0) >= -1e-6).all(), field
    assert (found[0][-1].recall[0] < found[-1][-1].recall[0]).all()
