"""What tests may touch: finds private members of the product, and imports of test modules."""

import ast
import re
import sys
import textwrap
from pathlib import Path

TUPLE = {"_replace", "_fields", "_asdict", "_make"}  # public names of named tuples
BY_NAME = {"setattr", "getattr", "delattr", "hasattr", "setitem", "object", "patch", "attrgetter"}
"""Functions that are told members as strings, of monkeypatch and mock too."""
OURS = {"qwen_jax", "pallas_kernels", "convert", "support"}


def violations(text: str, name: str = "<string>") -> list[str]:
    """Of Python's source, one line for each."""
    return [f"{name}:{line}: {said}" for line, said in sorted(set(_Visitor.of(ast.parse(text))))]


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None and name not in TUPLE


def _is_test(module: str) -> bool:
    return module.rpartition(".")[2].startswith("test_")


class _Visitor(ast.NodeVisitor):
    """Members count as private of the product unless they are a test's own, or a library's.

    A test's own are those that a class of the file defines and reaches by `self` or `cls`. A
    library's are those of a module that is none of ours, or of what was imported from one.
    """

    def __init__(self, tree: ast.AST):
        self.found: list[tuple[int, str]] = []
        self.foreign: set[str] = set()
        self.own: list[set[str]] = []
        self.classes = {
            node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.foreign |= set(_foreign(node))
            elif isinstance(node, ast.Assign) and _is_skip(node.value):
                self.foreign |= {each.id for each in node.targets if isinstance(each, ast.Name)}
        self.visit(tree)

    @classmethod
    def of(cls, tree: ast.AST, line: int = 0) -> list[tuple[int, str]]:
        return [(line + number, said) for number, said in cls(tree).found]

    def say(self, node: ast.AST, text: str) -> None:
        self.found.append((getattr(node, "lineno", 0), text))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.own.append(self._members(node))
        self.generic_visit(node)
        self.own.pop()

    def _members(self, node: ast.ClassDef) -> set[str]:
        """Names that a class and its bases in the file define."""
        names = {
            each.name
            for each in ast.walk(node)
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        if all(base in self.classes or base in self.foreign for base in bases):
            names |= {
                each.attr
                for each in ast.walk(node)
                if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
            }
        for base in bases:
            if base in self.classes and base != node.name:
                names |= self._members(self.classes[base])
        return names

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if is_private(node.attr) and not self._is_own(node) and not self._is_foreign(node.value):
            self.say(node, f"{ast.unparse(node)} is private")
        self.generic_visit(node)

    def _is_own(self, node: ast.Attribute) -> bool:
        mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        return mine and any(node.attr in names for names in self.own)

    def _is_foreign(self, node: ast.AST) -> bool:
        """Whether an expression begins at what was imported from a library."""
        while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
            node = node.func if isinstance(node, ast.Call) else node.value
        return isinstance(node, ast.Name) and node.id in self.foreign

    def visit_Import(self, node: ast.Import) -> None:
        for each in node.names:
            self._module(node, each.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        self._module(node, module)
        for each in node.names:
            if _is_test(each.name):
                self.say(node, f"{each.name} is a module of tests")
            if is_private(each.name) and _is_ours(module):
                self.say(node, f"{module}.{each.name} is private")

    def _module(self, node: ast.AST, module: str) -> None:
        if _is_test(module):
            self.say(node, f"{module} is a module of tests")
        if _is_ours(module) and any(map(is_private, module.split("."))):
            self.say(node, f"{module} is private")

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        called = function.attr if isinstance(function, ast.Attribute) else ""
        called = function.id if isinstance(function, ast.Name) else called
        strings = [
            each.value
            for each in node.args
            if isinstance(each, ast.Constant) and isinstance(each.value, str)
        ]
        if called in BY_NAME:
            of_library = node.args and self._is_foreign(node.args[0])
            for text in strings:
                if any(map(is_private, text.split("."))) and not of_library:
                    self.say(node, f"{text} is private")
        if called in ("import_module", "run_module", "__import__", "Child", "run"):
            for text in strings[:1]:
                if re.fullmatch(r"[\w.]+", text) and _is_test(text):
                    self.say(node, f"{text} is a module of tests")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._code(node, node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        parts = [each.value if isinstance(each, ast.Constant) else "0" for each in node.values]
        self._code(node, "".join(map(str, parts)))
        for each in node.values:
            if isinstance(each, ast.FormattedValue):
                self.visit(each)

    def _code(self, node: ast.AST, text: str) -> None:
        """Reads strings that are programs, such as those of children."""
        if not re.search(r"\bimport\b", text):
            return
        try:
            tree = ast.parse(textwrap.dedent(text))
        except (SyntaxError, ValueError):
            return
        self.found += [(node.lineno, said) for _, said in _Visitor.of(tree)]


def _foreign(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Names that an import binds to a library, or to something of it."""
    if isinstance(node, ast.ImportFrom):
        ours = _is_ours(node.module or "")
        return [] if ours else [each.asname or each.name for each in node.names]
    return [
        each.asname or each.name.partition(".")[0] for each in node.names if not _is_ours(each.name)
    ]


def _is_skip(node: ast.AST) -> bool:
    """Whether an expression is `pytest.importorskip` of a library."""
    if not isinstance(node, ast.Call) or "importorskip" not in ast.unparse(node.func):
        return False
    return isinstance(node.args[0], ast.Constant) and not _is_ours(str(node.args[0].value))


def _is_ours(module: str) -> bool:
    root = module.partition(".")[0]
    scripts = {path.stem for path in (Path(__file__).parents[2] / "scripts").glob("*.py")}
    return root in OURS | scripts or (_is_test(root) and root not in sys.stdlib_module_names)
