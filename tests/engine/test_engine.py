"""The engine with a real, tiny model: company, slicing and memory change nothing."""

import functools
import gc

import jax
import numpy as np
import pytest
from support.engine_programs import jitted
from support.random_models import smallest, weights

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import SparseConfig
from qwen_jax.engine import inputs
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.model_runner import Programs
from qwen_jax.engine.request import Request, RequestError, Sampling
from qwen_jax.engine.sampler import sample
from qwen_jax.sparse.budgets import TILES
from qwen_jax.sparse.recall import Grid

MAX_LEN, MAX_SEQS, PAGE, SLICES = 240, 4, 16, (32, 8)
CHUNK_LEN = 32
MODEL = smallest(
    num_layers=2,
    vocab_size=300,
    embed_dim=48,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=False,
    max_len=MAX_LEN,
    weights_dtype="float32",
    dual_chunk=ChunkGeometry(CHUNK_LEN + 8, 8),
    original_len=100,
)
POISON = MODEL.vocab_size - 1  # its embedding is NaN; it is never sampled


def build(**fields):
    tree = weights(MODEL)
    tree["embed"]["embedding"][POISON] = np.nan
    sizes = {"max_len": MAX_LEN, "max_seqs": MAX_SEQS, "page": PAGE, "slices": SLICES}
    config = EngineConfig(**(sizes | {"vocab_limit": POISON} | fields))
    # On a device by choice, as weights from a checkpoint are.
    return Engine(MODEL, jax.device_put(tree, jax.devices()[0]), config)


GRID = Grid(vertical=(64, 200), slash=(100, 200), last_q=8, tiles=TILES)


choose = jax.jit(sample, static_argnames="vocab_limit")


@functools.cache
def engine():
    """One engine for all tests: its steps are compiled once."""
    return build()


def tokens(seed, length):
    return tuple(np.random.default_rng(seed).integers(0, POISON, length).tolist())


SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.9, seed=5),
    Sampling(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05, seed=1),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=1.2, min_p=0.05, seed=2**32 - 1),
)


def requests(seed, count):
    """Ragged lengths; every third prompt begins alike, and short enough for one temperature."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        alike = i % 3 == 2
        prompt = tokens([seed, i], int(rng.integers(1, 50 if alike else 180)))
        made.append(
            Request(
                prompt=tokens([seed], 40) + prompt if alike else prompt,
                max_new_tokens=int(rng.integers(1, 50)),
                sampling=SAMPLINGS[i % len(SAMPLINGS)],
                eos_ids=(7, 8, 9),
            )
        )
    return made


def forget():
    """Leave the engine as if it had never seen a prompt."""
    pages = engine().pages
    pages.give(pages.take(pages.total))


@functools.cache
def alone(request):
    forget()
    return tuple(engine().run([request])[0])


@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_the_tokens_it_gets_alone(seed):
    mixed = requests(seed, 10)
    expected = [alone(request) for request in mixed]
    rng = np.random.default_rng(seed)
    shared = engine()
    forget()
    before = shared.num_prefilled
    ids, answers, ends = [], {}, {}
    cancelled = set(rng.choice(10, 2, replace=False).tolist())
    while len(ids) < len(mixed) or shared.busy:
        if len(ids) < len(mixed) and rng.random() < 0.2:
            ids.append(shared.add(mixed[len(ids)]))
            answers[ids[-1]] = []
        for event in shared.step():
            answers[event.request_id] += event.tokens
            if event.finish is not None:
                ends[event.request_id] = event.finish
        for index in list(cancelled):
            if index < len(ids) and len(answers[ids[index]]) >= 2:
                shared.cancel(ids[index])
                cancelled.discard(index)
    for number, answer in zip(ids, expected, strict=True):
        got = tuple(answers[number])
        if ends[number] == "cancelled":
            assert got == answer[: len(got)]
        else:
            assert got == answer
    assert sorted(ends) == ids
    assert shared.num_prefilled - before < sum(len(request.prompt) for request in mixed)


@pytest.mark.parametrize("setting", range(len(SAMPLINGS)))
def test_answers_follow_from_scores_across_chunk_borders(setting):
    """Decoding one by one agrees with scoring the whole text at once."""
    settings = SAMPLINGS[setting]
    prompt = tokens([1, setting], CHUNK_LEN - 5)
    new = 2 * CHUNK_LEN + 5  # ends before the temperature starts to depend on the length
    (answer,) = engine().run([Request(prompt=prompt, max_new_tokens=new, sampling=settings)])
    assert len(answer) == new
    text = (*prompt, *answer)
    logits = np.concatenate(list(engine().score(text)))
    seen = np.zeros(MODEL.vocab_size, bool)
    seen[list(prompt)] = True
    for position, token in enumerate(answer, start=len(prompt)):
        choice = inputs.sample_step(settings, row=0, position=position)
        expected = choose(logits[[position - 1]], choice.sampling, seen[None], vocab_limit=POISON)
        assert token == int(expected[0]), position
        seen[token] = True


def test_scores_of_the_last_positions_are_the_last_of_all_scores():
    text = tokens(2, 117)
    scores = np.concatenate(list(engine().score(text)))
    assert scores.shape == (117, MODEL.vocab_size)
    for last in (1, 40, 117):
        np.testing.assert_allclose(
            np.concatenate(list(engine().score(text, last=last))), scores[-last:], atol=1e-5
        )


def test_compilations_do_not_depend_on_the_prompt_length():
    fresh = engine()
    forget()
    penalised = Sampling(repetition_penalty=1.1, temperature=0.5)
    for sampling in (Sampling(), penalised):
        fresh.run([Request(prompt=tokens(3, 40), max_new_tokens=3, sampling=sampling)])
    list(fresh.score(tokens(3, 40)))
    before = fresh.num_compilations
    assert before <= 2 * len(SLICES) + 3
    for length in (1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 128, 200, 237):
        sampling = penalised if length % 2 else Sampling()
        fresh.run([Request(prompt=tokens(4, length), max_new_tokens=3, sampling=sampling)])
        list(fresh.score(tokens(5, length)))
    assert fresh.num_compilations == before


def test_the_second_step_of_each_kind_compiles_nothing():
    fresh = build()
    request = Request(prompt=tokens(3, 5), max_new_tokens=2)
    fresh.run([request])
    compiled = []

    def listen(event: str, duration: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        fresh.run([request])
        assert not compiled
        jax.block_until_ready(jax.jit(lambda x: x * 3)(np.float32(1)))
        assert compiled  # what is listened for exists
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_poisoned_request_fails_by_name_and_spares_the_others():
    shared = engine()
    good = [Request(prompt=tokens([6, i], 50 + i), max_new_tokens=30) for i in range(4)]
    expected = [alone(request) for request in good]
    ids = [shared.add(request) for request in good[:2]]
    answers, errors = {}, {}
    for _ in range(8):
        for event in shared.step():
            answers.setdefault(event.request_id, []).extend(event.tokens)
    bad = [shared.add(Request(prompt=(*tokens(7, n), POISON), max_new_tokens=9)) for n in (3, 70)]
    ids += [shared.add(request) for request in good[2:]]
    while shared.busy:
        for event in shared.step():
            answers.setdefault(event.request_id, []).extend(event.tokens)
            if event.error is not None:
                errors[event.request_id] = event.error
    assert sorted(errors) == bad
    assert all("not finite" in errors[number] for number in bad)
    assert [tuple(answers[number]) for number in ids] == expected
    with pytest.raises(RequestError, match="not finite"):
        shared.run([Request(prompt=(POISON,), max_new_tokens=1)])


def test_a_seed_gives_the_same_answer_again_and_another_seed_another():
    prompt = tokens(8, 20)

    def answer(seed):
        sampling = Sampling(temperature=1.5, seed=seed)
        return engine().run([Request(prompt=prompt, max_new_tokens=20, sampling=sampling)])

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_the_penalty_keeps_an_answer_from_repeating():
    prompt = tokens(9, 40)
    sampling = Sampling(repetition_penalty=1e4)
    (answer,) = engine().run([Request(prompt=prompt, max_new_tokens=100, sampling=sampling)])
    # Logits below zero are multiplied, those above divided: what was seen ends up near zero
    # or far below, so that any other token with a positive logit comes first.
    assert len(set(answer) | set(prompt)) == len(answer) + len(set(prompt))


def test_a_conversation_goes_on_without_reading_it_again():
    shared = engine()
    prompt = tokens(10, 30)
    (answer,) = shared.run([Request(prompt=prompt, max_new_tokens=40)])
    before = shared.num_prefilled
    follow_up = Request(prompt=(*prompt, *answer, *tokens(11, 5)), max_new_tokens=10)
    (shared_answer,) = shared.run([follow_up])
    kept = (len(prompt) + len(answer) - 1) // PAGE * PAGE
    assert shared.num_prefilled - before == len(follow_up.prompt) - kept
    assert tuple(shared_answer) == alone(follow_up)


@pytest.mark.usefixtures("unchecked")
def test_no_compiled_step_makes_a_second_cache():
    heads = MODEL.num_layers * ((200,) * MODEL.num_heads,)
    budgets = SparseConfig(vertical=heads, slash=heads)
    runner = build(max_len=16 * 1024, num_pages=8199, sparse=budgets).runner
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.cache))
    assert cache_bytes > 64e6  # more than the votes over the keys of one sequence take
    arrays = runner.weights, runner.rotary
    piece = inputs.prefill(
        (1,), size=SLICES[0], start=0, pages=[1], table_len=1024, scales=(1.0, 1.0)
    )
    slots = inputs.decode_slots([], max_seqs=MAX_SEQS, table_len=1024)
    step = inputs.decode(
        [], max_seqs=MAX_SEQS, page_table=slots.page_table, scales=lambda n: (1.0, 1.0)
    )
    steps = Programs(*map(jitted, runner.programs))
    programs = {
        "prefill": steps.prefill.lower(*arrays, runner.cache, piece),
        "prefill sparsely": steps.prefill_sparse.lower(
            *arrays, runner.cache, piece, runner.budgets
        ),
        "sparse_plan": steps.sparse_plan.lower(
            *arrays, runner.cache, piece, runner.budgets, layer=0
        ),
        "survey": steps.survey.lower(*arrays, runner.cache, piece, grid=GRID),
        "score": steps.score.lower(*arrays, runner.cache, piece),
        "decode": steps.decode.lower(*arrays, runner.cache, runner.seen, slots.sampling, step),
    }
    for name, lowered in programs.items():
        plan = lowered.compile().memory_analysis()
        assert plan.alias_size_in_bytes >= cache_bytes, name
        assert plan.temp_size_in_bytes < cache_bytes / 10, name


def test_no_second_cache_is_left_between_steps():
    shared = engine()
    shape = shared.runner.cache.keys.shape
    for request in requests(13, 3):
        shared.add(request)
    scores = shared.score(tokens(12, 100))
    while shared.busy:
        shared.step()
        next(scores, None)
        assert sum(array.shape == shape for array in jax.live_arrays()) == 2


def test_an_engine_that_is_dropped_frees_its_cache_at_once():
    short_lived = build(num_pages=77)
    short_lived.run([Request(prompt=tokens(14, 5), max_new_tokens=2)])
    shape = short_lived.runner.cache.keys.shape

    def alive():
        return sum(array.shape == shape for array in jax.live_arrays())

    gc.collect()  # what jax left behind when it traced holds arguments, too
    gc.disable()
    try:
        assert alive() == 2
        del short_lived
        assert alive() == 0
    finally:
        gc.enable()
