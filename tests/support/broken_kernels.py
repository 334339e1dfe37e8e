"""Backends made up for a test, such as kernels that are wrong on purpose."""

import functools
import itertools
import sys
from types import ModuleType

from pallas_kernels.dispatch import backend

_NUMBER = itertools.count()


def install(monkeypatch, **operations) -> str:
    """A backend that runs on CPUs, of a name that no other test has.

    Operations that are not given are those of the reference.
    """
    name = f"made_up_{next(_NUMBER)}"
    monkeypatch.setitem(backend.RUNS_ON, name, ("cpu",))
    monkeypatch.setattr(backend, "NAMES", (*backend.NAMES, name))
    for operation, function in backend.FUNCTIONS.items():
        module = ModuleType(f"pallas_kernels.{operation}.{name}")
        setattr(module, function, operations.get(operation, reference(operation)))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return name


def reference(operation):
    return getattr(backend.load(operation, "reference"), backend.FUNCTIONS[operation])


def break_(monkeypatch, operation, change) -> str:
    """The reference, but for one operation: `change(right, *args, **options)`."""
    return install(monkeypatch, **{operation: functools.partial(change, reference(operation))})
