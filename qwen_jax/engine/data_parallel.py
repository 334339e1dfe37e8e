"""Replicas: engines side by side, one for each part of a mesh along `data`.

Each replica steps in a thread of its own, and a step of all is over when one of them has
brought something. A step ends in a wait for the device, which lets other threads go on, so
that a long slice in one replica holds up no token of another; without threads their steps
would have to be cut where they wait. An engine is touched either by its thread during a
step or by the caller between two, never by both: what comes in meanwhile is kept until then.
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float32

from qwen_jax.config import ConfigError, ModelConfig
from qwen_jax.engine import interrupts
from qwen_jax.engine.engine import Engine, EngineConfig, Piece, Runs
from qwen_jax.engine.model_runner import Runner
from qwen_jax.engine.observer import Observer, Step
from qwen_jax.engine.request import Event, Request, Sparseness


@dataclasses.dataclass(slots=True, eq=False)
class _Replica:
    """An engine, its step in flight, and the calls that wait for the end of the step.

    Attributes:
        numbers: maps the engine's request id to the id of `Replicas`.
        left: tokens left to prefill and decode at most, by request id of `Replicas`.
        kept: calls that wait until the step is over, each with the request id it is for.
        flight: result of the step in flight; None between steps.
    """

    engine: Engine
    numbers: dict[int, int] = dataclasses.field(default_factory=dict)
    left: dict[int, int] = dataclasses.field(default_factory=dict)
    kept: list[tuple[int, Callable[[], None]]] = dataclasses.field(default_factory=list)
    flight: Future[list[Event]] | None = None

    def add(self, number: int, request: Request) -> None:
        self.numbers[self.engine.add(request)] = number

    def cancel(self, number: int) -> None:
        for theirs, ours in self.numbers.items():
            if ours == number:
                self.engine.cancel(theirs)

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """Makes the waiting calls and starts a step in `pool`, if there are requests."""
        if self.flight is None and self.left:
            while self.kept:
                _, call = self.kept.pop(0)
                call()
            self.flight = pool.submit(self.engine.step)

    def settle(self) -> None:
        """Waits for the step in flight; its events remain in `flight`."""
        if self.flight is not None:
            wait([self.flight])

    def drop(self, numbers: Container[int]) -> None:
        """Ends requests at once; must be called between two steps."""
        self.kept = [each for each in self.kept if each[0] not in numbers]
        theirs = [theirs for theirs, ours in self.numbers.items() if ours in numbers]
        self.engine.drop(theirs)
        for each in theirs:
            del self.numbers[each]
        for each in [number for number in self.left if number in numbers]:
            del self.left[each]


@dataclasses.dataclass(slots=True)
class _Work:
    """A request, its replica, and the number of tokens generated so far."""

    replica: _Replica
    request: Request
    written: int = 0


class Replicas(Runs):
    """Serves requests as an `Engine` does, on a mesh with `data`.

    A request goes to the replica with the fewest tokens left to read and to write. Replicas
    share nothing: a prompt finds only what its own replica has in its cache.

    Args:
        model: the configuration that the weights belong to.
        weights: parameter tree on the mesh; replicas use the arrays that lie there.
        config: of each replica.
        make_runner: of each replica, as in `Engine`.

    Raises:
        ConfigError: if the weights lie on no mesh, or the configuration asks for what the
            model or device cannot do.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights,
        config: EngineConfig,
        *,
        make_runner: Callable[..., Runner] | None = None,
    ):
        self._replicas = [
            _Replica(Engine(model, part, config, make_runner=make_runner))
            for part in split(weights)
        ]
        self._pool = ThreadPoolExecutor(len(self._replicas))
        self._work: dict[int, _Work] = {}
        self._num_requests = 0
        self._events: list[Event] = []  # that nobody has yet

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engine of each replica."""
        return tuple(each.engine for each in self._replicas)

    @property
    def busy(self) -> bool:
        """True if `step` has something to do."""
        return bool(self._events) or any(each.left for each in self._replicas)

    @property
    def num_prefilled(self) -> int:
        """Prompt tokens computed so far; shared pages do not count."""
        return sum(each.engine.num_prefilled for each in self._replicas)

    @property
    def slices(self) -> tuple[int, ...]:
        """Slice lengths in tokens that prefill is compiled for, largest first."""
        return self._replicas[0].engine.slices

    @property
    def max_seqs(self) -> int:
        """Maximum number of requests that run at once, in all replicas."""
        return sum(each.engine.max_seqs for each in self._replicas)

    @property
    def num_devices(self) -> int:
        """Number of devices of all replicas."""
        return sum(each.engine.num_devices for each in self._replicas)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache on one device."""
        return self._replicas[0].engine.cache_bytes

    @property
    def num_compilations(self) -> int:
        """Number of programs compiled so far, summed over replicas."""
        return sum(each.engine.num_compilations for each in self._replicas)

    def summary(self) -> str:
        """Returns one short line, as `Engine.summary`."""
        return f"{len(self._replicas)} replicas, each {self._replicas[0].engine.summary()}"

    def describe(self) -> str:
        """Returns one line on devices, kernels, dtype and sizes, as `Engine.describe`."""
        return f"{len(self._replicas)} replicas, each {self._replicas[0].engine.describe()}"

    def restore(
        self, tokens: Iterable[int], pieces: Iterable[Piece], sparse: Sparseness | None = None
    ) -> None:
        """Restores a prefix in every replica, as `Engine.restore`.

        Raises:
            RequestError: if the tokens are not in the model's vocabulary or do not fit.
        """
        tokens, pieces = tuple(tokens), tuple(pieces)
        for replica in self._replicas:
            replica.engine.restore(tokens, pieces, sparse)

    def observe(self, observer: Observer | None) -> None:
        """Calls `observer` around every step of all replicas; None removes the observer."""
        for index, each in enumerate(self._replicas):
            told = None
            if observer is not None:
                # Of the numbers alone: the replica would tie its engine into a circle.
                told = functools.partial(_observed, observer, index, each.numbers)
            each.engine.observe(told)

    def add(self, request: Request) -> int:
        """Queues a request; returns the id that its events will carry.

        Raises:
            RequestError: if it can never be served.
        """
        replica = self._least()
        replica.engine.check(request)
        number = self._num_requests
        with interrupts.deferred():
            self._num_requests += 1
            self._work[number] = _Work(replica, request)
            replica.left[number] = len(request.prompt) + request.max_new_tokens
            replica.kept.append((number, functools.partial(replica.add, number, request)))
        return number

    def check(self, request: Request) -> None:
        """Refuse what can never be served, see `Engine.check`."""
        self._replicas[0].engine.check(request)

    def cancel(self, request_id: int) -> None:
        """Ends a request before the next step of its replica; ignored if it has ended already."""
        if request_id in self._work:
            replica = self._work[request_id].replica
            replica.kept.append((request_id, functools.partial(replica.cancel, request_id)))

    def drop(self, request_ids: Container[int]) -> None:
        """Waits for the steps in flight, then ends requests; they get no further events."""
        with interrupts.deferred():
            dropped = [number for number in self._work if number in request_ids]
            if dropped:
                for replica in self._replicas:
                    replica.settle()
                self._land()
                for replica in self._replicas:
                    replica.drop(dropped)
                for number in dropped:
                    self._work.pop(number, None)
            self._events = [each for each in self._events if each.request_id not in request_ids]

    def step(self) -> list[Event]:
        """Waits until a replica has finished a step; returns the events so far, [] when idle.

        An exception of a replica's step is raised here, after the events of the others.
        """
        with interrupts.deferred():
            for replica in self._replicas:
                replica.begin(self._pool)
        flights = [each.flight for each in self._replicas if each.flight is not None]
        if not self._events:
            wait(flights, return_when=FIRST_COMPLETED)
        with interrupts.deferred():
            self._land()
            failed = [each for each in self._replicas if _has_failed(each)]
            if failed and not self._events:
                flight, failed[0].flight = failed[0].flight, None
                assert flight is not None
                flight.result()
        events, self._events = self._events, []
        return events

    def score(
        self, tokens: Iterable[int], *, last: int | None = None
    ) -> Iterator[Float32[np.ndarray, "n V"]]:
        """Yields float32 logits after each of the last `last` tokens (None: all) from one replica.

        Holds cache pages of that replica while it is being iterated.

        Raises:
            RequestError: if the tokens are not in the model's vocabulary or do not fit.
        """
        replica = self._least()
        replica.settle()
        blocks = replica.engine.score(tokens, last=last)
        assert isinstance(blocks, Generator)
        return _between_steps(replica, blocks)

    def _least(self) -> _Replica:
        return min(self._replicas, key=lambda each: sum(each.left.values()))

    def _land(self) -> None:
        """Collects the events of the steps that are over and have not failed."""
        for replica in self._replicas:
            flight = replica.flight
            if flight is not None and flight.done() and not _has_failed(replica):
                replica.flight = None
                self._events += [self._ours(replica, event) for event in flight.result()]

    def _ours(self, replica: _Replica, event: Event) -> Event:
        """Gives an engine's event the request id of `Replicas`, and updates the tokens left."""
        number = replica.numbers[event.request_id]
        work = self._work[number]
        work.written += len(event.tokens)
        to_read = len(work.request.prompt) - event.prefilled
        replica.left[number] = to_read + work.request.max_new_tokens - work.written
        if event.finish is not None:
            del self._work[number], replica.left[number], replica.numbers[event.request_id]
        return dataclasses.replace(event, request_id=number)


def _observed(
    observer: Observer, index: int, numbers: Mapping[int, int], step: Step
) -> AbstractContextManager[None]:
    """Calls the observer for a step of replica `index`, with request ids of `Replicas`."""
    step.replica, step.requests = index, tuple(numbers[each] for each in step.requests)
    return observer(step)


def _has_failed(replica: _Replica) -> bool:
    flight = replica.flight
    return flight is not None and flight.done() and flight.exception() is not None


def _between_steps(replica: _Replica, blocks: Generator[Any]) -> Iterator[Any]:
    """Yields the blocks of an engine, each computed while no step of it is in flight."""
    try:
        replica.settle()
        for block in blocks:
            yield block
            replica.settle()
    finally:
        replica.settle()
        blocks.close()


def build(
    model: ModelConfig,
    weights,
    config: EngineConfig,
    *,
    make_runner: Callable[..., Runner] | None = None,
) -> Engine | Replicas:
    """Builds what serves requests where the weights lie: replicas with `data`, else an engine.

    Args:
        make_runner: as in `Engine`.

    Raises:
        ConfigError: if the configuration asks for what the model or device cannot do.
    """
    mesh = _mesh(weights)
    many = mesh is not None and mesh.shape["data"] > 1
    return (Replicas if many else Engine)(model, weights, config, make_runner=make_runner)


def split(weights) -> list[Any]:
    """Splits weights into one tree for each part of the mesh along `data`, without copying.

    Raises:
        ConfigError: if the weights lie on no mesh, or on that of several processes.
    """
    mesh = _mesh(weights)
    if mesh is None:
        raise ConfigError("replicas need weights on a mesh with data")
    if not jax.tree.leaves(weights)[0].is_fully_addressable:
        raise ConfigError("replicas run in one process: use a mesh without data on several hosts")
    parts = [
        Mesh(mesh.devices[index : index + 1], mesh.axis_names, axis_types=mesh.axis_types)
        for index in range(mesh.shape["data"])
    ]
    return [jax.tree.map(lambda array, part=part: _part(array, part), weights) for part in parts]


def _mesh(weights) -> Mesh | None:
    placed = jax.tree.leaves(weights)[0].sharding
    if not isinstance(placed, NamedSharding):
        return None
    assert isinstance(placed.mesh, Mesh)
    return placed.mesh


def _part(array: jax.Array, mesh: Mesh) -> jax.Array:
    """Returns the part on `mesh` of an array that is replicated along `data`."""
    shards = {shard.device: shard.data for shard in array.addressable_shards}
    assert isinstance(array.sharding, NamedSharding)
    return jax.make_array_from_single_device_arrays(
        array.shape,
        NamedSharding(mesh, array.sharding.spec),
        [shards[device] for device in mesh.devices.flat],
    )
