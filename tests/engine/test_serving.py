"""The engine's bookkeeping, with a model that is a checksum of what the cache holds."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.checksum_engine import MAX_LEN, MODEL, ORIGINAL_LEN, alone, build
from support.draws import machine
from support.fake_runner import POISON, VOCAB

from pallas_kernels.dispatch import backend
from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import ConfigError
from qwen_jax.engine.engine import EngineConfig, Piece
from qwen_jax.engine.layout import EngineLayout
from qwen_jax.engine.request import Request, RequestError


def restore(engine, prompt, parity=False):
    """Puts what another engine has read of a prompt into an engine, in uneven pieces."""
    other = build(vllm_parity=parity, page=2)
    number = other.add(Request(prompt=prompt, max_new_tokens=2))
    pieces, start = [], 0
    while start < len(prompt):
        (event,) = other.step()
        if event.prefilled > start:
            window = other.take(number, start, event.prefilled)
            pieces.append(
                Piece(start=start, stop=event.prefilled, load=lambda _, window=window: window)
            )
            start = event.prefilled
    engine.restore(prompt, pieces)


class Serving(RuleBasedStateMachine):
    """Requests come, are cancelled and end, with prompts that often begin alike."""

    parity = False
    prefix = ()
    whole_slices = False

    def __init__(self):
        super().__init__()
        self.engine = build(num_pages=24, vllm_parity=self.parity, whole_slices=self.whole_slices)
        if self.prefix:
            restore(self.engine, self.prefix, self.parity)
        self.requests, self.answers, self.ends, self.cancelled = {}, {}, {}, set()
        self.expected = {}
        self.scoring = None

    @rule(
        first=st.integers(0, 2),
        length=st.integers(1, 40),
        change=st.integers(0, 80),
        new=st.integers(1, 8),
        poison=st.integers(0, 9),
        eos=st.sampled_from([(), (3,), (1, 2)]),
    )
    def add(self, first, length, change, new, poison, eos):
        prompt = [(first + i // 5) % (VOCAB - 1) for i in range(length)]
        if change < length:
            prompt[change] = 5
        if poison == 0:
            prompt[-1] = POISON
        request = Request(prompt=tuple(prompt), max_new_tokens=new, eos_ids=eos)
        number = self.engine.add(request)
        assert number not in self.requests
        self.requests[number], self.answers[number] = request, []
        self.expected[number] = alone(request, self.parity, self.prefix)

    @rule(data=st.data())
    @precondition(lambda self: self.requests.keys() - self.ends.keys())
    def cancel(self, data):
        number = data.draw(st.sampled_from(sorted(self.requests.keys() - self.ends.keys())))
        self.engine.cancel(number)
        self.cancelled.add(number)

    @rule(times=st.integers(1, 12))
    def step(self, times):
        for _ in range(times):
            events = self.engine.step()
            for event in events:
                self.check(event)
            assert not self.cancelled - self.ends.keys()

    def check(self, event):
        number, request = event.request_id, self.requests[event.request_id]
        assert number not in self.ends
        self.answers[number] += event.tokens
        assert 0 <= event.prefilled <= len(request.prompt)
        if event.tokens:
            assert event.prefilled == len(request.prompt)
        assert (event.error is not None) == (event.finish == "error")
        expected, end = self.expected[number]
        answer = self.answers[number]
        assert answer == expected[: len(answer)]
        if event.finish == "cancelled":
            assert number in self.cancelled
        elif event.finish is not None:
            assert (answer, event.finish) == (expected, end)
        if event.finish is not None:
            self.ends[number] = event.finish

    @rule(length=st.integers(1, MAX_LEN))
    @precondition(lambda self: self.scoring is None)
    def start_scoring(self, length):
        self.scoring = self.engine.score(tuple(i % 5 for i in range(length)))
        try:
            next(self.scoring)
        except RequestError:
            self.scoring = None

    @rule()
    @precondition(lambda self: self.scoring is not None)
    def stop_scoring(self):
        self.scoring.close()
        self.scoring = None

    @invariant()
    def pages_are_free_or_used(self):
        pages = self.engine.pages
        assert pages.free + pages.used == pages.total == 23
        assert self.engine.busy == bool(self.requests.keys() - self.ends.keys())

    def teardown(self):
        if self.scoring is not None:
            self.scoring.close()
        # A request takes at most a step for each token, when it has the engine for itself.
        bound = sum(len(r.prompt) + r.max_new_tokens for r in self.requests.values())
        for _ in range(bound):
            if not self.engine.busy:
                break
            self.step(1)
        assert self.ends.keys() == self.requests.keys()
        assert self.engine.pages.used == -(-len(self.prefix) // 4)
        assert self.engine.step() == []


class ServingInParity(Serving):
    parity = True


class ServingAfterAPrefix(Serving):
    prefix = tuple(1 + i // 5 for i in range(10))


class ServingAfterALongPrefix(Serving):
    prefix = tuple(1 + i // 5 for i in range(26))
    whole_slices = True


TestServing = machine(Serving, 60, 50)
TestServingAfterAPrefix = machine(ServingAfterAPrefix, 25, 50)
TestServingAfterALongPrefix = machine(ServingAfterALongPrefix, 25, 50)
TestServingInParity = machine(ServingInParity, 30, 50)


def test_a_shared_beginning_is_computed_once():
    engine = build()
    prompt = tuple(i % 7 for i in range(23))
    requests = [Request(prompt=(*prompt[:-1], last), max_new_tokens=1) for last in range(3)]
    engine.run(requests[:1])
    assert engine.num_prefilled == 23
    engine.run(requests[1:])
    assert engine.num_prefilled == 23 + 2 * 3


def test_prompts_of_different_temperature_share_nothing():
    engine = build()
    prompt = tuple(i % 7 for i in range(ORIGINAL_LEN + 2))
    for length, computed in ((ORIGINAL_LEN + 1, 25), (ORIGINAL_LEN + 2, 26), (ORIGINAL_LEN, 24)):
        before = engine.num_prefilled
        engine.run([Request(prompt=prompt[:length], max_new_tokens=1)])
        assert engine.num_prefilled - before == computed


@pytest.mark.parametrize("length", [1, 4, 10, 12, 26])
def test_a_prefix_from_outside_is_not_computed_again(length):
    engine = build(prefix_tokens=length)
    prefix = tuple(i % 7 for i in range(length))
    restore(engine, prefix)
    requests = [Request(prompt=(*prefix, last), max_new_tokens=1) for last in range(5)]
    expected = [alone(request, False, prefix)[0] for request in requests]
    assert engine.run(requests) == expected
    assert engine.num_prefilled == len(requests)
    other = Request(prompt=prefix, max_new_tokens=1)
    assert engine.run([other]) == [alone(other, False)[0]]
    assert engine.num_prefilled == len(requests) + length
    with pytest.raises(RequestError, match="holds restored tokens already"):
        engine.restore(prefix, ())


def test_what_was_restored_can_be_forgotten():
    engine = build(prefix_tokens=10)
    for first in range(2):
        prefix = (first,) * 10
        restore(engine, prefix)
        assert engine.restored == prefix
        request = Request(prompt=(*prefix, 5), max_new_tokens=1)
        assert engine.run([request]) == [alone(request, False, prefix)[0]]
        engine.forget()
        assert engine.restored == ()
        assert engine.pages.used == 0


def test_a_conversation_after_a_prefix_is_read_once():
    engine = build(prefix_tokens=10)
    prefix = tuple(i % 7 for i in range(10))
    restore(engine, prefix)
    prompt = (*prefix, 1, 2, 3)
    (answer,) = engine.run([Request(prompt=prompt, max_new_tokens=4)])
    before = engine.num_prefilled
    turn = Request(prompt=(*prompt, *answer, 5), max_new_tokens=1)
    assert engine.run([turn]) == [alone(turn, False, prefix)[0]]
    assert engine.num_prefilled - before == 2  # 16 of its 18 tokens fill pages


def test_a_prefix_leaves_room_for_what_comes_after_it():
    engine = build(prefix_tokens=30, max_seqs=2)
    prefix = tuple(i % 7 for i in range(30))
    assert engine.pages.total == 8 + 2 * (12 - 7)
    restore(engine, prefix)
    requests = [Request(prompt=(*prefix, last), max_new_tokens=17) for last in range(2)]
    for request in requests:
        engine.add(request)
    engine.step()
    engine.step()
    assert engine.pages.free == 0
    with pytest.raises(RequestError, match=r"41 in all.* holds 40"):
        engine.check(Request(prompt=(5,) * 40, max_new_tokens=1))
    engine.check(Request(prompt=(5,) * 39, max_new_tokens=1))


def test_only_what_was_read_can_be_taken_out():
    engine = build()
    number = engine.add(Request(prompt=(1,) * 12, max_new_tokens=2))
    with pytest.raises(RequestError, match=f"request {number} holds 0 tokens, not 0:8"):
        engine.take(number, 0, 8)
    engine.step()
    assert engine.take(number, 0, 8)[0].shape[1] >= 8
    for span in ((0, 9), (3, 3), (-1, 2)):
        with pytest.raises(RequestError, match="holds 8 tokens"):
            engine.take(number, *span)
    with pytest.raises(RequestError, match="request 9 holds 0"):
        engine.take(9, 0, 1)


def test_a_prefix_that_cannot_be_loaded_leaves_the_engine_as_it_was():
    def fail(_):
        raise OSError("no such window")

    engine = build()
    with pytest.raises(OSError, match="no such window"):
        engine.restore((1, 2, 3), [Piece(start=0, stop=3, load=fail)])
    assert engine.pages.used == 0
    with pytest.raises(RequestError, match="49 tokens do not fit"):
        engine.restore((1,) * 49, ())


def test_what_can_never_fit_is_refused_with_both_numbers():
    engine = build()
    with pytest.raises(RequestError, match=r"40 prompt .* 9 new .* 49 in all.* holds 48"):
        engine.add(Request(prompt=(1,) * 40, max_new_tokens=9))
    engine = build(num_pages=4)
    with pytest.raises(RequestError, match=r"13 in all.* holds 12 .*3 pages of 4"):
        engine.add(Request(prompt=(1,) * 8, max_new_tokens=5))
    with pytest.raises(RequestError, match=r"13 tokens .* holds 12"):
        engine.score((1,) * 13)
    assert not engine.busy


@pytest.mark.parametrize("field", ["prompt", "eos_ids"])
def test_ids_that_the_model_does_not_have_are_refused(field):
    fields = {"prompt": (1,), "max_new_tokens": 1, field: (1, VOCAB)}
    with pytest.raises(RequestError, match=rf"{field}\[1\]=12 .* 0 to 11"):
        build().add(Request(**fields))
    with pytest.raises(RequestError, match=r"tokens\[0\]=99"):
        build().score((99,))


def test_one_bad_request_of_several_queues_none():
    engine = build()
    good = Request(prompt=(1,), max_new_tokens=1)
    with pytest.raises(RequestError):
        engine.run([good, Request(prompt=(VOCAB,), max_new_tokens=1)])
    assert not engine.busy


def test_a_failed_request_is_named():
    engine = build()
    number = engine.add(Request(prompt=(1, 2, POISON), max_new_tokens=3))
    (event,) = engine.step()
    assert (event.request_id, event.finish) == (number, "error")
    assert event.error.startswith("the logits after token ")
    with pytest.raises(RequestError, match=f"request {number + 1}"):
        engine.run([Request(prompt=(POISON,), max_new_tokens=1)])


def test_cancelling_what_has_ended_is_ignored():
    engine = build()
    number = engine.add(Request(prompt=(1,), max_new_tokens=1))
    while engine.busy:
        engine.step()
    engine.cancel(number)
    engine.cancel(123)
    assert engine.step() == []


@pytest.mark.parametrize("length", [1, 2, 9, 16, 17, 40])
def test_scores_come_in_order_and_only_for_the_last_positions(length):
    tokens = tuple(i % 5 for i in range(length))
    for last in {None, 1, 2, length // 2, length} - {0}:
        if last is not None and last > length:
            continue
        engine = build()
        rows = np.concatenate(list(engine.score(tokens, last=last)))
        first = 0 if last is None else length - last
        assert rows.tolist() == [[i, tokens[i]] for i in range(first, length)]
        assert engine.pages.used == 0


@pytest.mark.parametrize("last", [0, -1, 4])
def test_more_scores_than_positions_are_refused(last):
    with pytest.raises(RequestError, match=f"last={last}"):
        build().score((1, 2, 3), last=last)


def test_scores_wait_for_pages_that_others_hold():
    engine = build(num_pages=4)
    engine.add(Request(prompt=(1,) * 4, max_new_tokens=8))
    engine.step()
    with pytest.raises(RequestError, match=r"need 2 cache pages, 0 are free"):
        next(engine.score((1,) * 5))


def test_a_request_that_waits_for_pages_of_scores_gets_them():
    engine = build(num_pages=8)
    scores = engine.score((1,) * 20)
    next(scores)
    number = engine.add(Request(prompt=(1,) * 20, max_new_tokens=1))
    assert engine.step() == []
    scores.close()
    assert [event.request_id for event in engine.step()] == [number]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_len": 0},
        {"max_seqs": 0},
        {"num_pages": 1},
        {"page": 0},
        {"vocab_limit": 0},
        {"vocab_limit": VOCAB + 1},
        {"slices": ()},
        {"slices": (2, 8)},
        {"slices": (8, 8)},
        {"slices": (8, 0)},
        {"backend": "abacus"},
    ],
)
def test_a_capacity_that_makes_no_sense_is_refused_by_name(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=name):
        build(**fields)


def layout_of(platform, geometry, **more):
    model = dataclasses.replace(MODEL, dual_chunk=geometry)
    return EngineLayout.resolve(model, EngineConfig(max_len=MAX_LEN), platform=platform, **more)


@pytest.mark.parametrize(
    ("platform", "geometry", "page", "slices"),
    [
        ("cpu", None, 512, (2048, 1024, 512, 256, 64)),
        ("tpu", None, 1024, (32768, 8192, 1024, 128)),
        ("tpu", ChunkGeometry(262144, 8192), 1024, (32768, 8192, 1024, 128)),
        ("tpu", ChunkGeometry(10_000, 1000), 1024, (32768, 8192, 1024, 128)),
        ("tpu", ChunkGeometry(4096, 512), 896, (32768, 8192, 1024, 128)),
        ("tpu", ChunkGeometry(512, 64), 1024, (32768, 8192, 1024, 128)),
        ("cpu", ChunkGeometry(262144, 8192), 1024, (2048, 1024, 512, 256, 64)),
        ("cpu", ChunkGeometry(2048, 256), 896, (1792, 1024, 512, 256, 64)),
        ("cpu", ChunkGeometry(1024, 128), 896, (896, 512, 256, 64)),
        ("cpu", ChunkGeometry(4096, 512), 896, (1792, 1024, 512, 256, 64)),
        ("cpu", ChunkGeometry(512, 64), 448, (448, 256, 64)),
        ("cpu", ChunkGeometry(320, 64), 256, (256, 64)),
        ("cpu", ChunkGeometry(2000, 1), 256, (1999, 1024, 512, 256, 64)),  # a prime
        ("cpu", ChunkGeometry(40, 8), 256, (2048, 1024, 512, 256, 64)),
    ],
)
def test_pages_and_slices_fit_the_chunks_of_the_model(platform, geometry, page, slices):
    found = layout_of(platform, geometry)
    assert (found.page, found.slices) == (page, slices)


@pytest.mark.parametrize(
    ("platform", "geometry", "slices"),
    [
        ("cpu", None, (4096, 2048, 1024, 512, 256, 64)),
        ("tpu", None, (32768, 8192, 1024, 128)),
        ("cpu", ChunkGeometry(262144, 8192), (4096, 2048, 1024, 512, 256, 64)),
        ("cpu", ChunkGeometry(4608, 512), (4096, 2048, 1024, 512, 256, 64)),
        ("cpu", ChunkGeometry(10000, 256), (3248, 2048, 1024, 512, 256, 64)),
    ],
)
def test_sparse_slices_are_larger_where_chunks_allow_it(platform, geometry, slices):
    assert layout_of(platform, geometry, sparse_slices=True).slices == slices


def test_the_description_is_one_line_with_the_sizes():
    line = build().describe()
    assert "\n" not in line
    for part in ("cpu", "xla", "float32", "36 pages of 4", "8/2", "3 x 48"):
        assert part in line


def test_the_description_says_why_the_kernels_of_the_device_do_not_run(monkeypatch):
    monkeypatch.setitem(backend.PREFERRED, "cpu", ("triton", "xla"))
    why = "select xla (triton: heads of 8 are none of 16, 32, 64, 128, 256); "
    assert why in build().describe()
    assert why not in build(backend="xla").describe()
