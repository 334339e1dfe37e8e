"""What tests may touch: finds private members of the product, and imports of test modules."""

import ast
import builtins
import re
import textwrap
from pathlib import Path

TUPLE = {"_replace", "_fields", "_asdict", "_make"}  # public names of named tuples
SCRIPTS = {path.stem for path in (Path(__file__).parents[2] / "scripts").glob("*.py")}
OURS = {"qwen_jax", "pallas_kernels", "convert", "support"} | SCRIPTS
BY_NAME = {"setattr", "getattr", "delattr", "hasattr", "object", "patch", "multiple", "attrgetter"}
"""Functions that are told members as strings, of monkeypatch and mock too."""
RUNNING = {"import_module", "run_module", "__import__", "Child", "run"}


def violations(text: str, name: str = "<string>") -> list[str]:
    """Of Python's source, one line for each."""
    return [f"{name}:{line}: {said}" for line, said in sorted(set(_Visitor(text).found))]


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None and name not in TUPLE


def _is_test(module: str) -> bool:
    return module.rpartition(".")[2].startswith("test_")


def _is_ours(module: str) -> bool:
    root = module.partition(".")[0]
    return root in OURS or _is_test(root)


def _text(node: ast.AST) -> str:
    """A string that is written out; "" for what is none."""
    value = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) else ""


class _Visitor(ast.NodeVisitor):
    """Members count as private of the product unless they are a test's own, or a library's.

    A test's own are those that a class of the file defines and reaches by `self` or `cls`. A
    library's are those of a module that is none of ours, or of what was imported from one.
    """

    def __init__(self, text: str):
        tree = ast.parse(text)
        self.found: list[tuple[int, str]] = []
        nodes = list(ast.walk(tree))
        self.classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
        self.foreign = {name for node in nodes for name in _foreign(node)}
        self.own: list[set[str]] = []
        self.visit(tree)

    def check(self, node: ast.AST, member: str, said: str = "") -> None:
        """Notes that a member is touched, by its path."""
        if any(map(is_private, member.split("."))):
            self.found.append((node.lineno, f"{said or member} is private"))

    def check_module(self, node: ast.AST, module: str) -> None:
        if _is_test(module):
            self.found.append((node.lineno, f"{module} is a module of tests"))
        if _is_ours(module):
            self.check(node, module)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if not self._is_alone(node):  # it might stand in place of the product's
            for each in node.body:
                self.check(each, getattr(each, "name", ""), node.name)
        self.own.append(self._members(node))
        self.generic_visit(node)
        self.own.pop()

    def _members(self, node: ast.ClassDef) -> set[str]:
        """Names that a class and its bases in the file define."""
        nodes = list(ast.walk(node))
        names = {each.name for each in nodes if isinstance(each, ast.FunctionDef)}
        if self._is_alone(node):
            stored = (each for each in nodes if isinstance(each, ast.Attribute))
            names |= {each.attr for each in stored if isinstance(each.ctx, ast.Store)}
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        return names.union(*(self._members(self.classes[b]) for b in bases if b in self.classes))

    def _is_alone(self, node: ast.ClassDef) -> bool:
        """Whether a class inherits nothing of ours but from its file."""
        return all(map(self._is_known, node.bases))

    def _is_known(self, base: ast.expr) -> bool:
        name = base.id if isinstance(base, ast.Name) else ""
        if name in self.classes:
            return self._is_alone(self.classes[name])
        return hasattr(builtins, name) or self._is_foreign(base)

    def _is_foreign(self, node: ast.AST) -> bool:
        """Whether an expression begins at what was imported from a library."""
        while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
            node = node.func if isinstance(node, ast.Call) else node.value
        return isinstance(node, ast.Name) and node.id in self.foreign

    def visit_Attribute(self, node: ast.Attribute) -> None:
        mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        is_own = mine and any(node.attr in names for names in self.own)
        if not is_own and not self._is_foreign(node.value):
            self.check(node, node.attr, ast.unparse(node))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        where = ast.unparse(node.value)
        if where.startswith("vars(") or where.endswith("__dict__"):
            self.check(node, _text(node.slice))
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for each in node.names:
            self.check_module(node, each.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for each in node.names:
            self.check_module(node, f"{node.module or ''}.{each.name}")
        self.check_module(node, node.module or "")

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in BY_NAME and not (node.args and self._is_foreign(node.args[0])):
            names = [*map(_text, node.args)]
            names += [each.arg or "" for each in node.keywords if called == "multiple"]
            for each in names:
                self.check(node, each)
        if called in RUNNING and node.args and re.fullmatch(r"[\w.]+", _text(node.args[0])):
            self.check_module(node, _text(node.args[0]))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        self._code(node, _text(node))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._code(node, "".join(_text(each) or "0" for each in node.values))
        for each in node.values:
            if isinstance(each, ast.FormattedValue):
                self.visit(each)

    def _code(self, node: ast.AST, text: str) -> None:
        """Reads strings that are programs, such as those of children."""
        if re.search(r"\bimport\b", text):
            try:
                found = _Visitor(textwrap.dedent(text)).found
            except (SyntaxError, ValueError):
                return
            self.found += [(node.lineno, said) for _, said in found]


def _foreign(node: ast.AST) -> list[str]:
    """Names that an import, or `pytest.importorskip`, binds to a library or to something of it."""
    if isinstance(node, ast.ImportFrom) and not _is_ours(node.module or ""):
        return [each.asname or each.name for each in node.names]
    if isinstance(node, ast.Import):
        names = [(each.name, each.asname or each.name.partition(".")[0]) for each in node.names]
        return [bound for name, bound in names if not _is_ours(name)]
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and node.value.args:
        skips = ast.unparse(node.value.func).endswith("importorskip")
        if skips and not _is_ours(_text(node.value.args[0])):
            return [each.id for each in node.targets if isinstance(each, ast.Name)]
    return []
