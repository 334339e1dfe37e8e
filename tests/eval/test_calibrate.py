"""Budgets from samples: least cost at the target; samples that outlive a kill."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from support.random_models import config

from pallas_kernels.dispatch.tiles import Tiles
from qwen_jax.sparse import calibrate
from qwen_jax.sparse.calibrate import CalibrationError, Progress, Sample
from qwen_jax.sparse.recall import Grid, Survey

GRID = Grid(vertical=(10, 20, 40), slash=(5, 50), last_q=4, tiles=Tiles(q=8, k=4))
CHOICES = tuple(itertools.product(range(len(GRID.vertical)), range(len(GRID.slash))))


def tables(*shape, seed=0):
    """Random numbers in (0, 1) that grow with both budgets, as recall and density do."""
    rng = np.random.default_rng(seed)
    steps = rng.exponential(size=(*shape, len(GRID.vertical), len(GRID.slash)))
    sums = steps.cumsum(-1).cumsum(-2)
    return sums / (sums[..., -1:, -1:] * rng.uniform(1.01, 1.3, (*shape, 1, 1)))


def one_sample(seed=0, layers=1, heads=2):
    recall, density, overall = tables(3, layers, heads, seed=seed)
    return Sample(recall=recall, density=density, overall=overall)


def chosen(budgets):
    """Places in the grid, [2, L, N]."""
    return (
        np.searchsorted(GRID.vertical, budgets.vertical),
        np.searchsorted(GRID.slash, budgets.slash),
    )


def at(table, pair):
    layer, head = np.indices(table.shape[:2])
    return table[layer, head, *pair]


def combinations(table):
    """Means over two heads of every choice for each."""
    first, second = table[0]
    return np.array([(first[a] + second[b]) / 2 for a in CHOICES for b in CHOICES])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_the_target_is_met_at_every_length_and_for_that_recall_nothing_is_cheaper(seed, share):
    samples = {100: [one_sample(seed)], 900: [one_sample(seed + 50), one_sample(seed + 90)]}
    recall = {n: np.mean([each.recall for each in found], 0) for n, found in samples.items()}
    density = np.mean([np.mean([e.density for e in found], 0) for found in samples.values()], 0)
    target = share * min(table[..., -1, -1].mean() for table in recall.values())
    budgets = calibrate.search(samples, GRID, target)
    pair = chosen(budgets)
    for length, table in recall.items():
        np.testing.assert_allclose(budgets.recall[length], at(table, pair))
        overall = np.mean([each.overall for each in samples[length]], 0)
        np.testing.assert_allclose(budgets.density[length], at(overall, pair))
        assert budgets.recall[length].mean() >= target

    gains, costs = combinations(np.mean(list(recall.values()), 0)), combinations(density)
    gain = np.mean([found.mean() for found in budgets.recall.values()])
    cost = at(density, pair).mean()
    assert costs[gains >= gain - 1e-12].min() >= cost - 1e-12
    # Of what one rate gives to both heads, anything cheaper misses the target somewhere.
    meets = np.all([combinations(table) >= target for table in recall.values()], 0)
    for rate in np.geomspace(1e-3, 1e3, 500):
        best = (rate * gains - costs).argmax()
        assert not meets[best] or costs[best] >= cost - 1e-12


def test_a_target_that_the_largest_budgets_just_meet_is_met():
    sample = one_sample()
    sample.recall[0, 0, -1, -1] = sample.recall[0, 0, -2, -1] + 1e-9  # worth no rate
    sample.density[0, 0, -1, -1] = 1
    target = float(sample.recall[..., -1, -1].mean())
    budgets = calibrate.search({100: [sample]}, GRID, target)
    assert (budgets.vertical.tolist(), budgets.slash.tolist()) == ([[40, 40]], [[50, 50]])
    assert budgets.recall[100].mean() >= target


def test_a_target_out_of_reach_is_one_clear_error():
    samples = {100: [one_sample(1)], 900: [one_sample(2)]}
    most = min(sample.recall[..., -1, -1].mean() for (sample,) in samples.values())
    with pytest.raises(CalibrationError) as error:
        calibrate.search(samples, GRID, most + 1e-6)
    text = str(error.value)
    assert "--target-recall" in text
    assert "is out of reach" in text
    assert "40 columns, 50 diagonals" in text
    assert f"find {most:.3f}" in text


def test_a_margin_is_aimed_at_beyond_the_target_as_far_as_there_is_one():
    samples = {100: [one_sample(1)], 900: [one_sample(2)]}
    aimed, beyond = (
        calibrate.search(samples, GRID, 0.55),
        calibrate.search(samples, GRID, 0.45, 0.1),
    )
    np.testing.assert_array_equal(aimed.vertical, beyond.vertical)
    np.testing.assert_array_equal(aimed.slash, beyond.slash)
    most = min(sample.recall[..., -1, -1].mean() for (sample,) in samples.values())
    all_of_it = calibrate.search(samples, GRID, 0.55, 0.9)
    assert min(recall.mean() for recall in all_of_it.recall.values()) == pytest.approx(most)


def test_attention_that_is_spread_gets_less_than_attention_in_few_keys():
    density = np.array([[0.1, 0.3], [0.2, 0.5], [0.4, 0.9]])
    few = np.array([[0.3, 0.4], [0.6, 0.8], [0.9, 0.97]])
    spread = density / 2
    both = np.stack([few, spread])[None]
    same = np.stack([density, density])[None]
    sample = Sample(recall=both, density=same, overall=same)
    budgets = calibrate.search({100: [sample]}, GRID, 0.45)
    assert budgets.vertical.tolist() == [[40, 10]]
    assert budgets.slash.tolist() == [[5, 5]]


def one_survey(seed):
    """A survey of one layer and two heads with dense counts that differ by slice."""
    rng = np.random.default_rng(seed)
    V, S = len(GRID.vertical) + 1, len(GRID.slash) + 1
    mass = rng.exponential(size=(1, 2, V, S))
    singles, blocks = rng.exponential(size=(1, 2, V, S)), rng.exponential(size=(1, 2, S))
    dense = np.full((1, 2), (singles.sum() + blocks.sum()) * (seed + 1))
    parts = mass / mass.sum((-2, -1), keepdims=True), singles, blocks, dense
    return Survey(*(part.astype(np.float32) for part in parts))


def test_a_sample_is_the_mean_of_the_slices_of_the_second_half():
    surveys = [one_survey(seed) for seed in range(4)]
    pieces = [(0, 8), (8, 3), (11, 4), (15, 5)]  # the second half begins inside the second
    found = calibrate.sample(
        ((*piece, survey) for piece, survey in zip(pieces, surveys, strict=True)), 20
    )
    recall = np.mean([survey.recall() for survey in surveys[1:]], 0)
    np.testing.assert_allclose(found.recall, recall)
    for first, density in ((1, found.density), (0, found.overall)):
        dense = [survey.dense[..., None, None] for survey in surveys[first:]]
        kept = sum(
            survey.density() * pairs for survey, pairs in zip(surveys[first:], dense, strict=True)
        )
        np.testing.assert_allclose(density, kept / sum(dense), rtol=1e-6)


def test_budgets_stay_below_the_longest_text():
    vertical, slash = calibrate.budgets_up_to(1000)
    assert (max(vertical), max(slash)) == (500, 800)
    assert calibrate.budgets_up_to(10) == ((64,), (100,))
    assert [len(sizes) for sizes in calibrate.budgets_up_to(2**20)] == [12, 12]


def test_the_report_and_the_file_hold_what_was_chosen():
    budgets = calibrate.search({100: [one_sample(3)], 900: [one_sample(4)]}, GRID, 0.5)
    model = config(heads=(2, 1))
    report = calibrate.report(budgets, GRID, model, model="some", target_recall=0.5, margin=0.1)
    assert (report["target_recall"], report["margin"]) == (0.5, 0.1)
    assert json.loads(json.dumps(report)) == report
    assert report["lengths"] == [100, 900]
    assert report["vertical"] == budgets.vertical.tolist()
    assert report["recall"]["900"] == budgets.recall[900].round(4).tolist()
    assert report["density"]["100"] == budgets.density[100].round(4).tolist()
    assert report["speedup"]["900"] > 1
    (layer,) = calibrate.file_content(budgets)
    for head in range(2):
        kind, vertical, slash, score = layer[str(head)]
        assert kind == "vertical_and_slash"
        assert (vertical, slash) == (budgets.vertical[0, head], budgets.slash[0, head])
        assert score == round(budgets.recall[900][0, head], 4)


def test_the_predicted_speed_up_counts_products_by_hand():
    model = dataclasses.replace(
        config(heads=(4, 2), head_dim=8), embed_dim=16, mlp_dim=32, vocab_size=50
    )
    linear = 16 * (4 + 2 + 2 + 4) * 8 + 3 * 16 * 32  # q, k, v, o; gate, up, down
    attention = 4 * 8 * 1000 + 4 * 8 * 1000  # of the two halves of 2,000 keys
    expected = (linear + attention) / (linear + attention / 4)
    assert calibrate.predicted_speedup(model, 2000, 0.25) == pytest.approx(expected)
    assert calibrate.predicted_speedup(model, 2000, 1.0) == 1


def same(one, other):
    for field in dataclasses.fields(Sample):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_samples_are_kept_under_their_settings_only(tmp_path):
    sample, where = one_sample(), tmp_path / "b.progress"
    Progress(where, {"slices": [8], "data": "x"}).save("100-0", sample)
    again = Progress(where, {"data": "x", "slices": [8]})
    same(again.load("100-0"), sample)
    assert again.load("100-1") is None
    other = Progress(where, {"data": "y", "slices": [8]})
    assert other.load("100-0") is None
    other.save("100-0", one_sample(1))
    again.clear()
    assert again.load("100-0") is None
    same(other.load("100-0"), one_sample(1))
    other.clear()
    assert not where.exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: b"\0" * 100,
        lambda content: content[: len(content) // 2],
        lambda content: content[:300] + bytes(20) + content[320:],
    ],
    ids=["empty", "zeros", "cut short", "overwritten"],
)
def test_a_damaged_sample_is_one_error_that_names_it(tmp_path, spoil):
    progress = Progress(tmp_path / "b.progress", {})
    progress.save("100-0", one_sample())
    (path,) = progress.directory.iterdir()
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CalibrationError, match="is damaged") as error:
        progress.load("100-0")
    assert str(path) in str(error.value)
    assert "delete it" in str(error.value)


def test_a_sample_that_was_not_written_to_its_end_does_not_count(tmp_path):
    progress = Progress(tmp_path / "b.progress", {})
    progress.save("100-0", one_sample())
    (path,) = progress.directory.iterdir()
    path.rename(path.with_suffix(".part"))
    assert progress.load("100-0") is None
    progress.clear()
    assert not progress.directory.exists()
