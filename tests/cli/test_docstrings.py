"""Docstrings begin with a verb or a noun, not with a fragment that only its neighbours explain."""

import ast
from collections.abc import Iterator

import pytest
from support.fences import ROOT

FRAGMENTS = {"Also", "How", "Of", "Those", "What", "When", "Where", "Whether"}
FILES = sorted(
    path
    for package in ("qwen_jax", "pallas_kernels", "convert")
    for path in (ROOT / package).rglob("*.py")
)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of every docstring: of modules, classes, functions and variables."""
    for node in ast.walk(ast.parse(source)):
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield child.lineno, text


def fragments(source: str) -> list[int]:
    """Returns the lines of docstrings that begin with one of `FRAGMENTS`."""
    return [line for line, text in docstrings(source) if {*text.split(maxsplit=1)[:1]} & FRAGMENTS]


def test_docstrings_begin_with_a_verb_or_a_noun():
    assert len(FILES) > 150
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in fragments(path.read_text())
    ]
    assert not found, f"begin with a verb or the thing itself: {', '.join(found)}"


@pytest.mark.parametrize(
    "source",
    [
        '"""What it does."""',
        'SIZE = 1\n"""Of a page."""',
        'class A:\n    """Where tokens go."""',
        'class A:\n    def f(self):\n        """\n        Whether it is."""',
    ],
)
def test_a_fragment_is_found_wherever_it_is(source):
    assert fragments(source)


def test_a_word_that_begins_alike_is_none():
    assert not fragments('"""Offsets of pages."""')
    assert not fragments('x = "Of course"')
