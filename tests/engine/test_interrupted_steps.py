"""Whatever stops an engine wherever it is: it serves what comes next as if nothing had been."""

import contextlib
import ctypes
import functools
import re
import signal
import sys
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_models

from qwen_jax.config import SparseConfig
from qwen_jax.engine import data_parallel, interrupts, model_runner, page_pool, scheduler
from qwen_jax.engine import engine as engines
from qwen_jax.engine.engine import Engine, EngineConfig, Piece
from qwen_jax.engine.request import EngineError, Request, Sampling

CONFIG = random_models.config(2, heads=(2, 1), head_dim=16, vocab_size=60)
BUDGETS = SparseConfig(
    vertical=((8, 8),) * CONFIG.num_layers,
    slash=((8, 8),) * CONFIG.num_layers,
    last_q=4,
    threshold=30,
)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as in a terminal: who starts tests in the background may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PREFIX = random_models.tokens(CONFIG, 12)
SCORED = random_models.tokens(CONFIG, 20)
REQUESTS = (
    Request(prompt=(*PREFIX, 7, 8, 9), max_new_tokens=3, sampling=Sampling(repetition_penalty=1.3)),
    Request(
        prompt=random_models.tokens(CONFIG, 37),
        max_new_tokens=2,
        sampling=Sampling(temperature=1.0, seed=3),
    ),
    Request(prompt=(5, 6, 7), max_new_tokens=1),
)
TRACED = {module.__file__ for module in (engines, model_runner, scheduler, page_pool)}


class Stopped(BaseException):
    pass


def stop():
    raise Stopped


def stop_soon():
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(threading.get_ident()), ctypes.py_object(Stopped)
    )


def press():
    signal.raise_signal(signal.SIGINT)


class Tracer:
    """Counts the lines that are reached, and does something at one of them."""

    def __init__(self, number=0, act=None):
        self.lines, self._number, self._act = [], number, act

    def __enter__(self):
        self._old = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(self._old)

    def __call__(self, frame, event, arg):
        return self._line if frame.f_code.co_filename in TRACED else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self._number:
                sys.settrace(None)
                self._act()
        return self._line


@functools.cache
def programs():
    """The compiled programs of one engine, which serve all that are alike."""
    made = []

    def keep(*args):
        made.append(original(*args))
        return made[-1]

    original = model_runner.programs
    with mock.patch.object(model_runner, "programs", keep):
        _build()
    return made[0]


def _build():
    weights = jax.device_put(random_models.weights(CONFIG))
    config = EngineConfig(
        max_len=48, max_seqs=2, page=8, slices=(16,), sparse=BUDGETS, dense_tail=4, num_pages=16
    )
    return Engine(CONFIG, weights, config)


def build():
    made = programs()
    with mock.patch.object(model_runner, "programs", return_value=made):
        return _build()


def restore(engine):
    """Puts the prefix into the cache, if that was not done."""

    def load(shape):
        values = np.random.default_rng(0).normal(size=shape.shape)
        return (jnp.asarray(values, shape.dtype),) * 2

    if not engine.restored:
        engine.restore(PREFIX, [Piece(start=0, stop=12, load=load)])


def work(engine):
    """All that an engine can be asked for; what came of it."""
    restore(engine)
    answers = engine.run(REQUESTS)
    number = engine.add(REQUESTS[0])
    engine.step()
    taken = engine.take(number, 0, 12)
    engine.cancel(number)
    engine.step()
    scores = np.concatenate([*engine.score(SCORED)])
    return answers, scores, [np.asarray(each)[:, :12] for each in taken]


def stopped_at(number, act):
    """Stops an engine at a line of its code; returns True if it is dead, else checks answers."""
    engine = build()
    with Tracer(number, act):
        try:
            work(engine)
            for _ in range(100):
                pass  # where what comes soon has come
        except (Stopped, KeyboardInterrupt):
            pass
    try:
        engine.score(SCORED)  # which computes nothing yet
        drain(engine)
        found = work(engine)
    except EngineError as error:
        for call in (
            lambda: engine.add(REQUESTS[0]),
            engine.step,
            lambda: engine.run(REQUESTS),
            lambda: engine.score(SCORED),
            lambda: engine.take(0, 0, 1),
            lambda: engine.restore(PREFIX, ()),
        ):
            with pytest.raises(EngineError, match=re.escape(str(error))):
                call()
        return True
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected()), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not engine.busy
    assert engine.pages.used == -(-len(engine.restored) // 8) == 2
    assert engine.free_rows == (0, 1)
    assert not engine.request_ids
    return False


def drain(engine):
    """Ends what was added by `add` and not by `run`, which ends its own."""
    assert len(engine.request_ids) <= 1
    for number in engine.request_ids:
        engine.cancel(number)
    while engine.busy:
        engine.step()


@functools.cache
def expected():
    return work(build())


@functools.cache
def reached():
    """The lines that work reaches, in order."""
    expected()
    engine = build()
    with Tracer() as tracer:
        work(engine)
    return tuple(tracer.lines)


def sampled(seed):
    """The number of one of the times that each line is reached."""
    times = {}
    for number, line in enumerate(reached(), 1):
        times.setdefault(line, []).append(number)
    rng = np.random.default_rng(seed)
    return [int(rng.choice(each)) for each in times.values()]


@pytest.mark.parametrize("act", [press, stop, stop_soon])
def test_an_engine_that_was_stopped_serves_on_or_says_that_it_cannot(act):
    check(act, sampled(0)[:: 29 if act is press else 53])


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("act", [press, stop, stop_soon])
def test_an_engine_may_be_stopped_at_every_line(act, seed):
    check(act, sampled(seed))


def check(act, numbers):
    dead = [number for number in numbers if stopped_at(number, act)]
    if act is press:
        assert not dead
    else:
        assert len(dead) < len(numbers) * 2 / 3


def test_events_of_a_step_that_was_interrupted_come_with_the_next():
    engine = build()
    number = engine.add(REQUESTS[2])
    decode = engine.runner.sample

    def choose(*args):
        press()
        return decode(*args)

    with mock.patch.object(engine.runner, "sample", choose), pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.busy
    (event,) = engine.step()
    assert event.request_id == number
    assert (event.finish, len(event.tokens)) == ("length", 1)
    assert not engine.busy


def test_a_cache_that_a_failed_step_took_along_is_missed():
    engine = build()
    engine.add(REQUESTS[2])

    def lose(*args):
        engine.runner.cache.keys.delete()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with (
        mock.patch.object(engine.runner, "prefill", lose),
        pytest.raises(jax.errors.JaxRuntimeError),
    ):
        engine.step()
    with pytest.raises(EngineError, match="build another engine"):
        engine.step()


def test_a_run_that_fails_leaves_nothing_behind_and_others_alone():
    engine = build()
    other = engine.add(REQUESTS[1])
    step, told = engine.step, []

    def fail():
        told.extend(step())
        if len(told) == 2:
            raise ValueError("the consumer")
        return []

    with mock.patch.object(engine, "step", fail), pytest.raises(ValueError, match="the consumer"):
        engine.run([REQUESTS[2], REQUESTS[1]])
    assert engine.request_ids == (other,)
    while engine.busy:
        told += engine.step()
    tokens = [token for event in told if event.request_id == other for token in event.tokens]
    assert [tokens] == build().run([REQUESTS[1]])


def test_signals_are_handled_at_the_end_once_and_only_where_python_handles_them():
    seen = []
    old = signal.signal(signal.SIGUSR1, lambda *args: seen.append(args))
    try:
        with interrupts.deferred():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            assert not seen
        assert [number for number, _ in seen] == [signal.SIGUSR1]
        signal.raise_signal(signal.SIGUSR1)
        assert len(seen) == 2
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_replicas_keep_their_requests_and_events_through_an_interrupt():
    made = programs()
    weights = jax.device_put(random_models.weights(CONFIG))
    config = EngineConfig(
        max_len=48, max_seqs=2, page=8, slices=(16,), sparse=BUDGETS, dense_tail=4, num_pages=16
    )
    with (
        mock.patch.object(model_runner, "programs", return_value=made),
        mock.patch.object(data_parallel, "split", lambda weights: [weights] * 2),
    ):
        serving = data_parallel.Replicas(CONFIG, weights, config)
    requests = REQUESTS[1:] * 2
    answers = serving.run(requests)
    numbers = [serving.add(each) for each in requests]
    told = []
    wait, deferred, waited = data_parallel.wait, interrupts.deferred, []

    def remember(*args, **options):
        waited.append(True)
        return wait(*args, **options)

    @contextlib.contextmanager
    def pressed():
        """Ctrl-C while events are taken that were waited for."""
        with deferred():
            if waited and threading.current_thread() is threading.main_thread():
                waited.clear()
                press()
            yield

    patches = (
        mock.patch.object(data_parallel, "wait", remember),
        mock.patch.object(interrupts, "deferred", pressed),
    )
    with patches[0], patches[1]:
        while serving.busy:
            try:
                told += serving.step()
            except KeyboardInterrupt:
                brought = serving.step()
                assert brought
                told += brought
    by_number = {number: [] for number in numbers}
    for event in told:
        by_number[event.request_id].extend(event.tokens)
    assert [*by_number.values()] == answers

    with patches[0], patches[1], pytest.raises(KeyboardInterrupt):
        serving.run(requests)
    assert not serving.busy
    assert serving.run(requests) == answers
