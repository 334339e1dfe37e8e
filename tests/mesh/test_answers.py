"""Serving on a mesh: the answers of one device, whatever else is served and wherever."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import compilation, demo_checkpoint, random_models
from support.children import run
from support.on_meshes import CONFIG, PART, mesh_of, place

from convert import weights
from qwen_jax.config import ConfigError, SparseConfig
from qwen_jax.distributed import sharding
from qwen_jax.engine.data_parallel import build, split
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.request import Request, Sampling
from qwen_jax.models import params
from qwen_jax.models.configs import model_config, sparse_config

SPARSE = SparseConfig(vertical=((60,) * 4,) * 3, slash=((80,) * 4,) * 3, last_q=16, threshold=100)
LENGTHS = 203, 61, 33, 97, 140, 7  # tokens of prompts


def prompts(most):
    """Some of different lengths, then one that begins as the longest does."""
    found = [random_models.tokens(CONFIG, length) for length in LENGTHS if length <= most]
    longest = max(found, key=len)
    return [*found, longest[:-20] + found[1][:3]]


def requests(most=256):
    return [
        Request(prompt=prompt, max_new_tokens=4 + number)
        for number, prompt in enumerate(prompts(most))
    ]


def serving(text, **fields):
    """Builds the engine or replicas of a random model on a mesh, or on one device."""
    seq = sharding.parse(text).seq if text else 1
    sizes = {"max_len": 256, "max_seqs": 2, "page": PART * seq, "slices": (48,), "dense_tail": 16}
    sizes |= fields
    tree = place(CONFIG, random_models.weights(CONFIG), text)
    return build(CONFIG, tree, EngineConfig(**sizes))


def test_answers_do_not_depend_on_the_mesh():
    run(compare, "seq=4,tensor=2", "data=2,seq=2,tensor=2")


def compare(text, replicated):
    """Dense and sparse prompts on a mesh, dense ones on replicas."""
    jax.config.update("jax_num_cpu_devices", 8)
    alone = serving("", sparse=SPARSE)
    expected = alone.run(requests())
    assert len(set(map(tuple, expected))) == len(expected)
    engine = serving(text, sparse=SPARSE)
    assert engine.run(requests()) == expected
    few = requests(SPARSE.threshold)
    expected = alone.run(few)
    serve = serving(replicated)
    assert serve.run(few) == expected
    check_shared(engine)
    for each in engine, serve:
        check_cancel(each, few, expected)
        check_logprobs(each, few, alone)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_vocabulary_that_the_mesh_does_not_divide_gives_the_answers_of_one_device(tied, tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=61, tie_embeddings=tied, dual_chunk=None)
    random_models.save(config, random_models.weights(config), tmp_path)
    run(compare_padded, tmp_path)


def compare_padded(directory):
    jax.config.update("jax_num_cpu_devices", 4)
    config = model_config(directory)
    prompt = random_models.tokens(config, 61)
    # A high temperature draws from all tokens alike: one of the padding would show.
    wild = {"temperature": 1e3, "seed": 3}
    made = []
    for text in "seq=1", "seq=2,tensor=2", "data=2,tensor=2":
        mesh = mesh_of(text)
        tree = weights.load(directory, shardings=params.shardings(config, mesh))
        assert len(tree["embed"]["embedding"]) == 61 + (mesh.shape["tensor"] == 2)
        engine = build(config, tree, EngineConfig(max_len=256, page=64, slices=(48,), max_seqs=2))
        asked = [
            Request(prompt=prompt, max_new_tokens=12),
            Request(prompt=prompt, max_new_tokens=150, sampling=Sampling(**wild)),
        ]
        made.append((engine.run(asked), np.concatenate(list(engine.score(prompt)))))
    answers, scores = made[0]
    assert scores.shape == (61, 61)
    for others, found in made[1:]:
        assert found.shape == scores.shape
        assert np.abs(found - scores).max() <= 1e-5 * np.abs(scores).max()
        assert others == answers
        assert max(others[1]) < 61


def check_shared(engine):
    """A prompt whose beginning is in the cache is not computed from there on."""
    prompt = random_models.tokens(CONFIG, 98)
    page = PART * 4
    for computed in len(prompt), len(prompt) - page:
        before = engine.num_prefilled
        engine.run([Request(prompt=prompt, max_new_tokens=1)])
        assert engine.num_prefilled - before == computed


def check_logprobs(serve, some, alone):
    """Every other request asks for log-probabilities and gets those of one device."""
    asked = [
        dataclasses.replace(each, logprobs=None if number % 2 else 5)
        for number, each in enumerate(some)
    ]
    served, expectations = logprobs(serve, asked), logprobs(alone, asked)
    assert [bool(each) for each in served] == [each.logprobs is not None for each in asked]
    for found, expected in zip(served, expectations, strict=True):
        assert [top[0][0] for top in found] == [top[0][0] for top in expected]
        values, others = ([[v for _, v in top] for top in each] for each in (found, expected))
        np.testing.assert_allclose(values, others, atol=1e-4)


def logprobs(serve, asked):
    """The sampled and the likeliest tokens with their log-probabilities, per request and token."""
    found = {serve.add(each): [] for each in asked}
    while serve.busy:
        for event in serve.step():
            found[event.request_id] += [
                ((token, each.logprob), *each.top)
                for token, each in zip(event.tokens, event.logprobs, strict=False)
            ]
    return list(found.values())


def check_cancel(serve, some, expected):
    """A request that ends early changes no other, and what ran before compiles nothing anew."""
    before = serve.num_compilations
    numbers = [serve.add(each) for each in some]
    answers = {number: [] for number in numbers}
    finish = {}
    while serve.busy:
        for event in serve.step():
            answers[event.request_id] += event.tokens
            finish[event.request_id] = event.finish
        serve.cancel(numbers[0])
    assert finish.pop(numbers[0]) == "cancelled"
    assert set(finish.values()) == {"length"}
    assert [answers[number] for number in numbers[1:]] == expected[1:]
    assert serve.num_compilations == before


@pytest.mark.long
@pytest.mark.parametrize(
    "meshes", [("seq=8", "data=8", "data=2,seq=2,tensor=2"), ("seq=3", "data=3,tensor=2", "seq=7")]
)
def test_answers_and_scores_do_not_depend_on_any_mesh(meshes):
    run(compare_more, *meshes)


def compare_more(*meshes):
    jax.config.update("jax_num_cpu_devices", 8)
    alone = serving("", sparse=SPARSE)
    expected = alone.run(requests())
    prompt = requests()[0].prompt
    scores = np.concatenate(list(alone.score(prompt, last=70)))
    for text in meshes:
        serve = serving(text, sparse=SPARSE)
        assert serve.run(requests()) == expected, text
        found = np.concatenate(list(serve.score(prompt, last=70)))
        assert np.abs(found - scores).max() <= 1e-5 * np.abs(scores).max()
        check_cancel(serve, requests(), expected)


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["seq=5", "data=2,seq=2,tensor=2"])
def test_no_length_or_slice_depends_on_the_mesh(mesh):
    run(draw, mesh)


def draw(text):
    jax.config.update("jax_num_cpu_devices", 8)
    engines = {}

    def engine(mesh, size):
        if (mesh, size) not in engines:
            engines[mesh, size] = serving(mesh, slices=(size,), num_pages=70)
        return engines[mesh, size]

    @given(
        lengths=st.lists(st.integers(1, 240), min_size=1, max_size=4),
        new=st.integers(1, 12),
        size=st.sampled_from([20, 48, 7]),
    )
    @settings(deadline=None, max_examples=60)
    def same(lengths, new, size):
        asked = [
            Request(prompt=random_models.tokens(CONFIG, length), max_new_tokens=new)
            for length in lengths
        ]
        assert engine(text, size).run(asked) == engine("", 48).run(asked)

    same()


def test_replicas_use_the_arrays_that_lie_there():
    run(split_weights)


def split_weights():
    jax.config.update("jax_num_cpu_devices", 8)
    for text, size in (("data=2,seq=2,tensor=2", 4), ("data=8", 1)):
        tree = place(CONFIG, random_models.weights(CONFIG), text)
        parts = split(tree)
        used = [array.devices() for part in parts for array in jax.tree.leaves(part)[:1]]
        assert [len(devices) for devices in used] == [size] * len(parts)
        assert len(set().union(*used)) == 8
        for part in parts:
            for array, whole in zip(jax.tree.leaves(part), jax.tree.leaves(tree), strict=True):
                np.testing.assert_array_equal(array, whole)
                there = {each.data.unsafe_buffer_pointer() for each in whole.addressable_shards}
                for shard in array.addressable_shards:
                    assert shard.data.unsafe_buffer_pointer() in there
        with pytest.raises(ConfigError, match="use Replicas"):
            Engine(CONFIG, tree, EngineConfig(max_len=8))
    tree = place(CONFIG, random_models.weights(CONFIG), "seq=4,tensor=2")
    with pytest.raises(ConfigError, match="page=50 must be a multiple of seq=4"):
        Engine(CONFIG, tree, EngineConfig(max_len=64, page=50))
    with pytest.raises(ConfigError, match="plans are made on one device: leave out the mesh"):
        Engine(CONFIG, tree, EngineConfig(max_len=64, sparse=SPARSE)).plans((1, 2), 0, 0)


@pytest.mark.long
@pytest.mark.demo
def test_the_demo_model_answers_alike_on_eight_devices():
    run(ask_demo, demo_checkpoint.directory())


def ask_demo(directory):
    jax.config.update("jax_num_cpu_devices", 8)
    compilation.optimize(True)
    config = model_config(directory)
    budgets = sparse_config(
        directory, config, demo_checkpoint.ROOT / "docs/demo/sparse_attention_config.json"
    )
    assert budgets is not None
    budgets = dataclasses.replace(budgets, threshold=2500)
    asked = [
        Request(prompt=random_models.tokens(config, length), max_new_tokens=24)
        for length in (700, 4321, 2400, 5000)
    ]
    found = []
    for text in "", "seq=8":
        tree = place(config, weights.load(directory), text)
        settings = EngineConfig(max_len=5100, max_seqs=3, sparse=budgets, slices=(1024,))
        found.append(build(config, tree, settings).run(asked))
        del tree
    assert found[0] == found[1]
