"""JSON values with one or more changes of every kind, for fuzzing what reads them."""

import copy
import random
from typing import Any

STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**31,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    502.5,
    "",
    "x",
    "../x",
    "/tmp/x",
    "a/b",
    "\x00",
    "\x1b[2J",
    "a\nb",
    "\u202e",
    "config.json",
    "0" * 64,
    "x" * 300,
    [],
    [[]],
    [1, 2, 3],
    ["x"],
    {},
    {"x": 1},
    {"": None},
)


def mutated(value: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy with one change inside, now and then with several."""
    value = copy.deepcopy(value)
    for _ in range(1 if rng.random() < 0.8 else rng.randint(2, 4)):
        changed = _changed(value, rng)
        value = changed if isinstance(changed, dict) else value
    return value


def _changed(value: Any, rng: random.Random) -> Any:
    """The value with a change somewhere inside, which is made in place where it can be."""
    inside = isinstance(value, (dict, list)) and len(value) > 0
    if not inside or rng.random() < 0.05:
        return _other(value, rng)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    kind = rng.random()
    if kind < 0.08:
        del value[key]
    elif kind < 0.16 and isinstance(value, list):
        value.insert(rng.randrange(len(value) + 1), copy.deepcopy(rng.choice(value)))
    elif kind < 0.16:
        value[rng.choice(["x", "", "format", str(key) + "x"])] = copy.deepcopy(value[key])
    elif kind < 0.22:
        other = rng.choice(keys)
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = _changed(value[key], rng)
    return value


def _other(value: Any, rng: random.Random) -> Any:
    """Another value, often of the same kind."""
    kind = rng.random()
    if type(value) is int and kind < 0.5:
        return value + rng.choice([-(2**40), -8, -1, 1, 8, 2**40])
    if isinstance(value, str) and kind < 0.5:
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(["", "x", "0", "/", ".", "\n", "é", "{"]) + value[at + 1 :]
    return copy.deepcopy(rng.choice(STRANGE))
