"""Replicas: requests go where least is left to do, and no replica waits for another."""

import contextlib
import threading

import numpy as np
import pytest
from support.checksum_engine import MAX_LEN, MODEL, TREE, alone, replicas
from support.fake_runner import POISON, FakeRunner

from qwen_jax.config import ConfigError
from qwen_jax.engine import data_parallel
from qwen_jax.engine.data_parallel import Replicas
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.request import Request, RequestError


def build(count=2, runner=FakeRunner):
    config = EngineConfig(max_len=MAX_LEN, max_seqs=2, page=4, slices=(8, 2))
    return replicas(count, config, runner)


def request(length, new=4, last=1, **more):
    return Request(prompt=(2,) * (length - 1) + (last,), max_new_tokens=new, **more)


def served(serving):
    """Tokens and last event of every request, once there is nothing left to do."""
    tokens, last = {}, {}
    while serving.busy:
        for event in serving.step():
            assert event.request_id not in last
            tokens.setdefault(event.request_id, []).extend(event.tokens)
            if event.finish is not None:
                last[event.request_id] = event
    assert serving.step() == []
    return tokens, last


@pytest.mark.parametrize("count", [1, 3])
def test_every_request_gets_the_answer_that_it_gets_alone(count):
    serving = build(count)
    requests = [request(length, new=1 + length % 5) for length in (30, 3, 17, 9, 40, 1, 2, 26)]
    numbers = [serving.add(each) for each in requests]
    assert numbers == list(range(len(requests)))
    tokens, last = served(serving)
    for number, each in zip(numbers, requests, strict=True):
        assert (tokens[number], last[number].finish) == alone(each, False)
        assert last[number].prefilled == len(each.prompt)
    fine = [number for number in numbers if last[number].finish != "error"]
    assert len(fine) > len(numbers) // 2
    assert serving.run([requests[number] for number in fine]) == [tokens[number] for number in fine]
    assert 0 < serving.num_prefilled < 2 * sum(len(each.prompt) for each in requests)


def test_a_request_goes_where_least_is_left_to_do():
    serving = build()
    for first, length in enumerate((20, 5, 5, 5, 16)):  # on the first 20, on the second 15, 31
        serving.add(Request(prompt=(first,) * length, max_new_tokens=1))
    served(serving)
    assert [each.num_prefilled for each in serving.engines] == [20, 31]
    serving.add(Request(prompt=(6,) * 9, max_new_tokens=1))
    served(serving)
    assert [each.num_prefilled for each in serving.engines] == [29, 31]


def test_a_request_that_fails_disturbs_no_other():
    serving = build()
    requests = [request(12, last=POISON), request(12), request(13), request(5, last=POISON)]
    for each in requests:
        serving.add(each)
    tokens, last = served(serving)
    for number, each in enumerate(requests):
        assert (tokens[number], last[number].finish) == alone(each, False)
    assert [number for number, event in last.items() if event.error] != []
    with pytest.raises(RequestError, match="not finite"):
        serving.run([requests[0]])


def test_a_request_that_is_cancelled_ends_wherever_it_is():
    serving = build()
    numbers = [serving.add(request(30, new=10)) for _ in range(8)]  # some wait for a row
    serving.step()
    for number in numbers[::2]:
        serving.cancel(number)
    last = served(serving)[1]
    assert {number for number, event in last.items() if event.finish == "cancelled"} == set(
        numbers[::2]
    )
    serving.cancel(numbers[0])
    serving.cancel(99)
    assert not serving.busy


def test_what_does_not_fit_is_refused_before_anything_runs():
    serving = build()
    with pytest.raises(RequestError, match="do not fit"):
        serving.add(request(MAX_LEN))
    with pytest.raises(RequestError, match="do not fit"):
        serving.run([request(4), request(MAX_LEN)])
    assert not serving.busy


class Gated(FakeRunner):
    """Waits in every slice that begins with token 3, until it may go on."""

    gate = threading.Event()

    def prefill(self, step):
        if step.tokens[0] == 3:
            assert self.gate.wait(30)
        return super().prefill(step)


def test_a_long_slice_holds_up_no_other_replica():
    Gated.gate.clear()
    serving = build(runner=Gated)
    slow = serving.add(Request(prompt=(3,) * 8, max_new_tokens=2))
    fast = serving.add(request(4, new=3))
    finished = []
    while not finished:
        finished += [event.request_id for event in serving.step() if event.finish]
    assert finished == [fast]
    late = serving.add(request(4, new=2))  # while a step is in flight
    serving.cancel(slow)
    while late not in finished:
        finished += [event.request_id for event in serving.step() if event.finish]
    assert slow not in finished
    Gated.gate.set()
    assert served(serving)[1].keys() == {slow}


class Broken(FakeRunner):
    def prefill(self, step):
        if step.tokens[0] == 3:
            raise MemoryError
        return super().prefill(step)


class Halfway(Gated):
    """Without its cache while a step is in flight, as where that is donated."""

    def prefill(self, step):
        self.is_whole = False
        done = super().prefill(step)
        self.is_whole = True
        return done


def test_a_replica_in_the_middle_of_a_step_takes_requests():
    Halfway.gate.clear()
    serving = build(runner=Halfway)
    slow = serving.add(Request(prompt=(3,) * 8, max_new_tokens=2))
    fast = serving.add(request(4, new=1))
    while not any(event.request_id == fast and event.finish for event in serving.step()):
        pass
    late = [serving.add(request(4, new=2)) for _ in range(4)]  # some by the one that is held up
    Halfway.gate.set()
    assert served(serving)[1].keys() == {slow, *late}


def test_what_a_step_raises_loses_no_event_of_the_others():
    serving = build(runner=Broken)
    serving.add(Request(prompt=(3,) * 8, max_new_tokens=2))
    fine = request(4, new=3)
    number = serving.add(fine)
    tokens, finish, raised = [], None, 0
    while finish is None:
        try:
            for event in serving.step():
                assert event.request_id == number
                tokens += event.tokens
                finish = event.finish
        except MemoryError:
            raised += 1
    assert raised
    assert (tokens, finish) == alone(fine, False)


def test_scores_are_made_between_steps():
    serving = build()
    tokens = (1, 2, 3) * 7
    expected = np.concatenate(list(build(1).score(tokens)))
    serving.add(request(30, new=10))
    blocks = []
    for block in serving.score(tokens):
        blocks.append(block)
        serving.step()
    np.testing.assert_array_equal(np.concatenate(blocks), expected)
    score = serving.score(tokens)
    next(score)
    score.close()
    served(serving)
    assert [each.pages.used for each in serving.engines] == [0, 0]
    with pytest.raises(RequestError, match="last=0"):
        serving.score(tokens, last=0)


def test_an_observer_is_told_of_the_steps_of_all_by_our_numbers():
    steps = []

    @contextlib.contextmanager
    def observe(step):
        assert step.compiled == 0
        yield
        steps.append(step)

    serving = build()
    serving.observe(observe)
    lengths = (30, 3, 17, 9, 21)
    for first, length in enumerate(lengths):  # that share no page
        serving.add(Request(prompt=(first,) * length, max_new_tokens=4))
    tokens, last = served(serving)
    assert {step.replica for step in steps} == {0, 1}
    for number, length in enumerate(lengths):
        mine = [step for step in steps if number in step.requests]
        slices = [step for step in mine if step.kind == "prefill"]
        assert sum(step.tokens for step in slices) == length
        assert [step.start for step in slices] == list(range(0, length, 8))
        assert {step.size for step in slices} <= {8, 2}
        assert all(step.requests == (number,) for step in slices)
        decoded = [step for step in mine if step.kind == "decode"]
        assert len(decoded) == len(tokens[number]) - (last[number].finish == "length")
        assert all(step.tokens == len(step.requests) <= step.size == 2 for step in decoded)
        assert len({step.replica for step in mine}) == 1
    assert all(step.pages >= 1 for step in steps)
    assert all(step.density is None and step.recall is None for step in steps)
    before = len(steps)
    list(serving.score((1, 2, 3) * 7, last=6))
    assert [step.kind for step in steps[before:]] == ["prefill", "score", "score"]
    assert [step.start for step in steps[before:]] == [0, 8, 16]
    assert [step.tokens for step in steps[before:]] == [8, 8, 5]
    assert all(step.requests == () for step in steps[before:])
    before = len(steps)
    serving.observe(None)
    serving.add(request(4))
    served(serving)
    assert len(steps) == before


def test_replicas_need_a_mesh():
    with pytest.raises(ConfigError, match="weights on a mesh"):
        Replicas(MODEL, TREE, EngineConfig(max_len=8))
    built = data_parallel.build(MODEL, TREE, EngineConfig(max_len=8), make_runner=FakeRunner)
    assert isinstance(built, Engine)
