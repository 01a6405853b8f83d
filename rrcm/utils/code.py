"""Fingerprints of code: of modules and everything that they import. They change when the code computes something else.

A fingerprint is a hash of a module's syntax tree. Comments, docstrings, annotations, formatting and the order of
imports do not change it. Neither do the messages of an `RRCMError`, nor the entries of a `Registry`: a run includes the
modules of the entries that it uses. The same source has the same fingerprint under every version of Python.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import NamedTuple

STDLIB = sysconfig.get_path("stdlib")
DIGITS = 16  # hexadecimal digits of a fingerprint
IGNORED_FIELDS = {"ctx", "type_comment", "type_params", "kind"}  # of syntax trees: they do not affect what runs
IGNORED_CALLS = {"RRCMError", "Registry"}  # their arguments do not affect results


class Module(NamedTuple):
    """The fingerprint of a module, and what it imports."""

    fingerprint: str
    imports: tuple[str, ...]  # names of modules, and of the objects that are imported from them


def fingerprints(*modules: str, without: Iterable[str] = ()) -> dict[str, str]:
    """The fingerprints of `modules` and of all modules that they import, directly or indirectly, by module name.

    Imported modules count if they belong to rrcm, or if they are the user's own code, which is not installed in the
    environment. The modules in `without`, such as "rrcm.utils.files", and modules that only they import are left out.
    """
    by_module: dict[str, str] = {}
    waiting, seen = list(modules), set(without)
    while waiting:
        name = waiting.pop()
        path = None if name in seen else _source_file(name)
        seen.add(name)
        if path is None or (_is_installed(name, path) and name not in modules):
            continue
        module = read_module(name, path)
        by_module[name] = module.fingerprint
        if not _is_installed(name, path):
            waiting += module.imports
    return dict(sorted(by_module.items()))


def read_module(name: str, path: Path) -> Module:
    """Read the module `name` from the file `path`."""
    status = path.stat()
    return _read_module(name, path, status.st_mtime_ns, status.st_size)


@cache
def _read_module(name: str, path: Path, *_: int) -> Module:
    if path.suffix != ".py":  # compiled
        return Module(hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS], ())
    tree = essence(ast.parse(path.read_bytes()), is_package=path.name == "__init__.py")
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return Module(fingerprint_of(tree), tuple(_imports(tree, package)))


def fingerprint_of(tree: ast.AST) -> str:
    """The hash of a syntax tree. It does not depend on the version of Python that parsed it."""
    return hashlib.sha256(_canonical(tree).encode()).hexdigest()[:DIGITS]


def _canonical(node: object) -> str:
    if isinstance(node, ast.Constant):
        return f"{type(node.value).__name__} {node.value!r}"
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={_canonical(value)}"
            for name, value in ast.iter_fields(node)
            if name not in IGNORED_FIELDS and value is not None and value != []  # fields of later versions are empty
        ]
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return repr(node)


def essence(tree: ast.Module, is_package: bool = False) -> ast.Module:
    """A module's syntax tree without the parts that have no effect at run time.

    Imports that only annotations need are left out too, except in a package, which may import names for other modules.
    """
    tree = _Essence().visit(tree)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return _Imports(None if is_package else used).visit(tree)


class _Essence(ast.NodeTransformer):
    """Removes docstrings, annotations and the arguments of IGNORED_CALLS."""

    def __init__(self) -> None:
        self.in_class = False  # in the body of a class, an annotation declares a field

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        outside, self.in_class = self.in_class, True
        self.generic_visit(node)
        self.in_class = outside
        return _with_bodies(node)

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        outside, self.in_class = self.in_class, False
        self.generic_visit(node)
        node.returns, self.in_class = None, outside
        return _with_bodies(node)

    visit_FunctionDef = visit_AsyncFunctionDef = _visit_function

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        if self.in_class:
            node.annotation = ast.Constant(None)
            return node
        return None if node.value is None else ast.Assign([node.target], node.value)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST] | None:
        self.generic_visit(node)
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse or None
        return _with_bodies(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id in IGNORED_CALLS:
            return ast.Call(node.func, [], [])
        return self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        self.generic_visit(node)
        parts: list[ast.expr] = []
        for part in node.values:  # each version of Python splits the text between values differently
            if isinstance(part, ast.Constant) and parts and isinstance(parts[-1], ast.Constant):
                parts[-1] = ast.Constant(parts[-1].value + part.value)
            elif not (isinstance(part, ast.Constant) and part.value == ""):
                parts.append(part)
        node.values = parts
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        return _with_bodies(super().generic_visit(node))


def _with_bodies(node: ast.AST) -> ast.AST:
    """The node, with a `pass` in a body that has become empty."""
    if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
        node.body = [ast.Pass()]
    return node


class _Imports(ast.NodeTransformer):
    """Splits neighbouring imports into one name each and sorts them. Drops names not in `used`, unless it is None."""

    def __init__(self, used: set[str] | None):
        self.used = used

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, field, None), list):
                setattr(node, field, list(self._sorted(statements)))
        return _with_bodies(node)

    def _sorted(self, statements: list[ast.stmt]) -> Iterator[ast.stmt]:
        run: list[ast.stmt] = []
        for statement in [*statements, None]:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                run += self._needed(statement)
                continue
            yield from sorted(run, key=_canonical)
            run = []
            if statement is not None:
                yield statement

    def _needed(self, statement: ast.Import | ast.ImportFrom) -> Iterator[ast.stmt]:
        for alias in statement.names:
            if self.used is None or (alias.asname or alias.name.partition(".")[0]) in self.used | {"*"}:
                origin = {} if isinstance(statement, ast.Import) else {"module": statement.module}
                yield type(statement)(names=[alias], **origin, **_level(statement))


def _level(statement: ast.stmt) -> dict[str, int]:
    return {"level": statement.level} if getattr(statement, "level", 0) else {}


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """The names of all modules that a tree imports, and of the objects that it imports from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            level = getattr(node, "level", 0)
            source = resolve_name("." * level + (node.module or ""), package) if level else node.module
            yield from (source, *(f"{source}.{alias.name}" for alias in node.names))


def _source_file(module: str) -> Path | None:
    """The source file of a module or package, found without an import. None if there is no such module."""
    top, *below = module.split(".")
    if module in sys.modules and top != "rrcm":
        path = Path(getattr(sys.modules[module], "__file__", None) or "")
        return path if path.is_file() else None
    paths = [place.joinpath(*below) for place in _find_top(top)]
    files = [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")]
    return next((file for file in files if file.is_file()), None)


def _find_top(name: str) -> list[Path]:
    """The folders of a package of the top level, or the file of a module of the top level without its suffix."""
    if name == "rrcm":
        return [Path(__file__).parents[1]]
    try:
        found = find_spec(name)
    except (ImportError, ValueError):  # it was imported in an unusual way, such as __main__
        return []
    if found is None or found.submodule_search_locations or not found.origin:
        return [Path(folder) for folder in getattr(found, "submodule_search_locations", None) or []]
    return [Path(found.origin).with_suffix("")]


def _is_installed(module: str, path: Path) -> bool:
    """Whether a module belongs to the environment: to Python or to an installed package other than rrcm."""
    if module.split(".")[0] == "rrcm":
        return False
    return (
        path.suffix != ".py"
        or path.is_relative_to(STDLIB)
        or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    )
