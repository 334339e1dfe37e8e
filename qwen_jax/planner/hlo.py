"""Collectives of a compiled program, parsed from its HLO text."""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Of jax's names of element types, those that are not spelled with their bits.
_BITS = {"pred": 8, "token": 0}


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
        kind: name in XLA.
        axes: mesh axes along which it communicates, joined by "+"; "?" if the groups match none.
        shape: shape of a device's operand, as XLA writes it.
        put: bytes of the operand.
        sent: bytes that a device sends each time, if all devices send the same.
    """

    kind: str
    axes: str
    shape: str
    put: int
    sent: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Computation:
    """An HLO computation: instructions by name, as type, operation, and the rest of the line."""

    lines: dict[str, tuple[str, str, str]]

    @property
    def starts_collective(self) -> bool:
        return any('"AsyncCollectiveStart"' in rest for _, _, rest in self.lines.values())


def collectives(text: str, mesh: Mapping[str, int]) -> Counter[Collective]:
    """Counts the collectives of one run of a program.

    Bytes are those of bandwidth-optimal algorithms: each part goes to every
    other device once, and an all-reduce takes twice that. Of the branches of a conditional the
    one that sends most counts.

    Args:
        text: HLO text of the program after all optimisations.
        mesh: sizes of the mesh axes, in the order of its devices.

    Raises:
        ValueError: if a loop with collectives has an unknown trip count.
    """
    computations, entry = _computations(text)
    groups = _groups_of(mesh)
    done: dict[str, Counter[Collective]] = {}

    def of(name: str) -> Counter[Collective]:
        if name not in done:
            done[name] = _sum(name)
        return done[name]

    def _sum(name: str) -> Counter[Collective]:
        computation, found = computations[name], Counter()
        for kind, rest, shape in _operations(computation):
            # TPUs spread one over several computations, of which the first starts it.
            if "async_collective_fusion" not in rest or computation.starts_collective:
                found[_collective(kind, rest, shape, groups, math.prod(mesh.values()))] += 1
        for _, operation, rest in computation.lines.values():
            called = re.findall(r"(\w+)=\{?(%[\w.-]+(?:, %[\w.-]+)*)\}?", rest)
            called = {key: names.split(", ") for key, names in called}
            if operation == "while":
                inner = of(called["body"][0])
                if inner:
                    times = _trips(rest, computations[called["condition"][0]])
                    found += Counter({each: times * count for each, count in inner.items()})
            elif operation == "conditional":
                keys = "branch_computations", "true_computation", "false_computation"
                branches = [of(name) for key in keys for name in called.get(key, ())]
                found += max(branches, key=sent)
            else:
                for key in ("calls", "to_apply", "called_computations"):
                    for name in called.get(key, ()):
                        found += of(name)
        return found

    return of(entry)


def sent(found: Counter[Collective]) -> int:
    """Returns the total bytes that a device sends."""
    return sum(count * each.sent for each, count in found.items())


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """Parses all computations by name; also returns the name of the entry computation."""
    found: dict[str, _Computation] = {}
    entry = ""
    current: dict[str, tuple[str, str, str]] = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?(%[\w.-]+) \(.*\{$", line):
            current = {}
            found[head[2]] = _Computation(current)
            entry = head[2] if head[1] else entry
        elif made := re.match(r"  (?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$", line):
            current[made[1]] = made[2], made[3], made[4]
    return found, entry


def _operations(computation: _Computation):
    """Yields kind, rest of the line and operand types of every collective."""
    for _, operation, rest in computation.lines.values():
        kind = operation.removesuffix("-start")
        if kind in _KINDS:
            operands = re.findall(r"%[\w.-]+", rest[: rest.index(")")])
            shape = ", ".join(computation.lines[name][0] for name in operands)
            yield kind, rest, re.sub(r"\{[^}]*\}", "", shape)


def _collective(kind: str, rest: str, shape: str, groups, devices: int) -> Collective:
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}(?:,|$)", rest):
        ids = [int(number) for number in re.findall(r"\d+", pairs[1])]
        found = {frozenset(pair) for pair in zip(ids[::2], ids[1::2], strict=True)}
        fits = (axes for axes, each in groups if all(any(p <= g for g in each) for p in found))
        size = 2
    else:
        found = {frozenset(group) for group in _parsed_groups(rest, devices)}
        fits = (axes for axes, each in groups if each == found)
        size = len(next(iter(found)))
    put = sum(map(_bytes, re.findall(r"[a-z]\w*\[[\d,]*\]", shape)))
    sent = {
        "all-gather": put * (size - 1),
        "all-reduce": 2 * put * (size - 1) // size,
        "collective-permute": put,
        "collective-broadcast": put,
    }.get(kind, put * (size - 1) // size)
    return Collective(kind, next(fits, "?"), shape, put, sent)


def _groups_of(mesh: Mapping[str, int]) -> list[tuple[str, set[frozenset[int]]]]:
    """Returns the groups of devices along each combination of mesh axes, few axes first."""
    names = [name for name, size in mesh.items() if size > 1]
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    found = []
    for count in range(1, len(names) + 1):
        for some in itertools.combinations(names, count):
            last = [list(mesh).index(name) for name in some]
            rows = np.moveaxis(ids, last, range(-count, 0))
            rows = rows.reshape(-1, math.prod(mesh[name] for name in some))
            found.append(("+".join(some), {frozenset(row) for row in rows.tolist()}))
    return found


def _parsed_groups(rest: str, devices: int) -> list[list[int]]:
    """Parses the replica groups of a collective, in any of XLA's three notations."""
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return [[int(n) for n in re.findall(r"\d+", group)] for group in listed[1].split("},")]
    if dealt := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, sizes = ([int(n) for n in each.split(",")] for each in dealt.groups()[:2])
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if dealt[3]:
            ids = ids.transpose([int(n) for n in dealt[3].split(",")])
        return ids.reshape(shape).tolist()
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        ids = np.arange(devices).reshape([int(size) for _, size in axes])
        names = [name for name, _ in axes]
        last = [names.index(name) for name in re.findall(r"'(\w+)'", named[2])]
        size = math.prod(ids.shape[axis] for axis in last)
        return np.moveaxis(ids, last, range(-len(last), 0)).reshape(-1, size).tolist()
    return [list(range(devices))]


def _bytes(shape: str) -> int:
    dtype, dims = shape.rstrip("]").split("[")
    bits = _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8


def _trips(rest: str, condition: _Computation) -> int:
    """Returns the trip count of a loop that counts from 0 by 1.

    Raises:
        ValueError: if its condition does not show it.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
        return int(known[1])
    limits = [
        int(rest[: rest.index(")")])
        for kind, operation, rest in condition.lines.values()
        if operation == "constant" and kind.startswith("s32[]")
    ]
    below = [rest for _, operation, rest in condition.lines.values() if "direction=LT" in rest]
    if len(limits) != 1 or len(below) != 1:
        raise ValueError(
            f"a loop sends something, and its condition does not say how often: {rest}"
        )
    return limits[0]
