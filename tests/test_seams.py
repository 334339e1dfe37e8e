"""Tests stand on what users see: no private member of the product, no other module of tests."""

from pathlib import Path

import pytest
from support.seams import violations

FILES = sorted({*Path(__file__).parent.rglob("*.py")} - {Path(__file__)})  # which has examples


def test_no_test_touches_a_private_member_or_another_test():
    assert len(FILES) > 190
    found = [
        said
        for path in FILES
        for said in violations(path.read_text(), str(path.relative_to(Path(__file__).parent)))
    ]
    assert not found, "\n".join(found)


REFUSED = {
    "an attribute": "import qwen_jax\nqwen_jax.engine._cache",
    "of what a call returned": "from qwen_jax import LLM\nLLM('x').engine._runner.step()",
    "of an argument": "def test(engine):\n    engine._pages = None",
    "of a module under another name": "from convert import weights as w\nw._writes('x')",
    "of a script": "import tpu_compile\ntpu_compile._schedule()",
    "of a subclass": (
        "from qwen_jax.engine.engine import Engine\nclass E(Engine):\n"
        "    def step(self):\n        self._events = []"
    ),
    "an import": "from qwen_jax.models.params import _restore",
    "a module": "import qwen_jax._core",
    "a helper's": "from support import jobs\njobs._address",
    "monkeypatch": "def test(monkeypatch, engine):\n    monkeypatch.setattr(engine, '_runner', 1)",
    "monkeypatch by path": "def test(monkeypatch):\n    monkeypatch.setattr('qwen_jax.a._b', 1)",
    "mock": "from unittest import mock\nmock.patch.object(engine, '_land', None)",
    "mock by path": "from unittest import mock\nmock.patch('convert.publish._exchange')",
    "mock of several": "from unittest import mock\nmock.patch.multiple(engine, _land=None)",
    "a method in its place": "class E(Engine):\n    def _land(self): pass",
    "of a subclass of that": (
        "class E(Engine): pass\nclass F(E):\n    def step(self):\n        self._events = []"
    ),
    "vars": "vars(engine)['_pages']",
    "getattr": "getattr(engine, '_runner')",
    "a child": "CODE = 'from convert import publish\\npublish._exchange = None'",
    "a child, formatted": "CODE = f'import convert.x\\nconvert.x._y({n})'",
    "a test": "import test_engine",
    "of a test": "from test_engine import MODEL",
    "a test in a package": "from tests.engine import test_engine",
    "a test in a child": "from support.children import run\nrun('test_engine', 'compare')",
    "a test by name": "import importlib\nimportlib.import_module('tests.test_engine')",
    "a test in a string": "CODE = 'import test_engine'",
}
TAKEN = {
    "its own": "class Fake:\n    def set(self): self._x = 1\n    def x(self): return self._x",
    "a library's": "from jax._src import config\nimport os\nos._exit(config._x('y')._z)",
    "a library's, set": "import os\ndef test(monkeypatch): monkeypatch.setattr(os, '_exit', 1)",
    "a named tuple": "def test(row): row._replace(x=1)",
    "magic": "import qwen_jax\nqwen_jax.__version__, qwen_jax.LLM.__init__",
    "a function of its own": "def _run(): pass\n_run()",
    "words": "TEXT = 'an import of x._y is refused'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_private_members_and_tests_are_found(name):
    assert violations(REFUSED[name])


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_public_or_no_part_of_the_product_is_left_alone(name):
    assert violations(TAKEN[name]) == []
