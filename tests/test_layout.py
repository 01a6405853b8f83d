"""The layout of the package: layers, import directions, cycles, docstrings, and the size of functions."""

import ast
import importlib.util
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import PRELOAD, REPOSITORY

# From bottom to top. A module may import from its own package and from packages of lower layers.
LAYERS = [
    {"rrcm.utils"},
    {"rrcm.methods"},
    {"rrcm.derived", "rrcm.plugins"},
    {"rrcm.constraints", "rrcm.sections"},
    {"rrcm.config"},
    {"rrcm.data", "rrcm.models"},
    {"rrcm.sources", "rrcm.objectives"},
    {"rrcm.certification"},
    {"rrcm.evaluation"},
    {"rrcm.report", "rrcm.training", "rrcm.fingerprints"},
    {"rrcm.own_images", "rrcm.publication"},
    {"rrcm.cli"},
    {"rrcm"},  # rrcm/__init__.py: the public names
]
# Packages whose registries, the upper-case names in their __init__.py, any layer may import. An entry is the text of
# where an object is, so the names are known without the objects.
REGISTRIES = {"rrcm.models", "rrcm.objectives", "rrcm.sources"}
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
OUTSIDE = {"stages", "tests", "benchmarks", "conftest"}  # they use the package, never the other way round
DRAWING = {"matplotlib", "PIL.ImageDraw", "PIL.ImageFont"}
MAX_LINES = 80  # of a function, unless its docstring or a comment on its first line says "long because ..."


class Import(NamedTuple):
    """An import statement, wherever it stands: at the top of a module or inside a function."""

    module: str  # that imports
    target: str  # dotted name of what is imported, a module or a name in one
    place: str  # file:line


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a source file below `root`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def walk_running_code(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `tree` but those that only type checkers see, in the body of `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from walk_running_code(node)


def read_imports(root: Path) -> list[Import]:
    """All imports of the package `rrcm` in `root`, including those by `import_module("...")`."""
    found = []
    for path in sorted((root / "rrcm").rglob("*.py")):
        module = module_name(path, root)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in walk_running_code(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=names):
                    targets = [alias.name for alias in names]
                case ast.ImportFrom(module=source, names=names, level=level):
                    base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                    prefix = ".".join([*base, *([source] if source else [])])
                    targets = [f"{prefix}.{alias.name}" for alias in names]
                case ast.Call(func=ast.Name(id="import_module"), args=[ast.Constant(value=str(target)), *_]):
                    targets = [target]
                case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(target)), *_]):
                    targets = [target]
                case _:
                    continue
            found += [Import(module, target, f"{path.relative_to(root)}:{node.lineno}") for target in targets]
    return found


def package_of(name: str) -> str:
    """The package or top-level module of rrcm that a dotted name belongs to; "" for other libraries."""
    first, _, rest = name.partition(".")
    if first != "rrcm":
        return ""
    inner = f"rrcm.{rest.partition('.')[0]}"
    return inner if inner in LEVEL else "rrcm"


def wrong_directions(imports: list[Import]) -> list[str]:
    """Imports from a higher layer, or from another package of the same layer. REGISTRIES may be imported."""
    wrong = []
    for module, target, place in imports:
        source, goal = package_of(module), package_of(target)
        package, _, name = target.rpartition(".")
        if package in REGISTRIES and name.isupper():
            continue
        if goal and source != goal and LEVEL[goal] >= LEVEL[source]:
            way = "sideways" if LEVEL[goal] == LEVEL[source] else "upwards"
            wrong.append(f"{place}: {source} imports {way} from {target}")
    return wrong


def find_cycle(imports: list[Import], modules: set[str]) -> list[str]:
    """The modules of an import cycle, if there is one."""
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, target, _ in imports:
        home = target if target in modules else target.rpartition(".")[0]
        if home in modules and home != module:
            graph[module].add(home)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def imports_of(imports: list[Import], names: set[str], allowed: tuple[str, ...] = ()) -> list[str]:
    """Imports of `names` or of anything in them by packages that are not `allowed` to."""
    return [
        f"{place}: {module} imports {target}"
        for module, target, place in imports
        if package_of(module) not in allowed and any(f"{target}.".startswith(f"{name}.") for name in names)
    ]


def long_functions(path: Path) -> Iterator[str]:
    """Functions of a file with more than MAX_LINES lines and no reason for it."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            comment = lines[node.lineno - 1].partition("#")[2]
            if length > MAX_LINES and "long because" not in f"{ast.get_docstring(node)} {comment}":
                yield f"{path.name}:{node.lineno}: {node.name} has {length} lines"


IMPORTS = read_imports(REPOSITORY)
MODULES = {module_name(path, REPOSITORY) for path in (REPOSITORY / "rrcm").rglob("*.py")}
PACKAGES = sorted(path.parent for path in (REPOSITORY / "rrcm").glob("*/__init__.py"))


def test_every_package_has_a_layer():
    inner = {".".join(module.split(".")[:2]) for module in MODULES}
    assert inner <= LEVEL.keys(), "add it to LAYERS"
    assert len(IMPORTS) > 200  # they were read


def test_imports_go_downwards():
    assert not (wrong := wrong_directions(IMPORTS)), "\n" + "\n".join(wrong)


@pytest.mark.parametrize("package", sorted(REGISTRIES))
def test_a_registry_imports_none_of_its_entries(package):
    assert {target for module, target, _ in IMPORTS if module == package} == {"rrcm.utils.registry.Registry"}


def test_no_import_cycle():
    assert not (cycle := find_cycle(IMPORTS, MODULES)), " -> ".join(cycle)


def test_the_package_imports_nothing_that_uses_it():
    assert not (wrong := imports_of(IMPORTS, OUTSIDE)), "\n" + "\n".join(wrong)


def test_only_the_report_draws():
    assert not (wrong := imports_of(IMPORTS, DRAWING, allowed=("rrcm.report",))), "\n" + "\n".join(wrong)


def write_package(root: Path, **sources: str) -> list[Import]:
    """A package `rrcm` with the given modules, named with __ for the dots; returns its imports."""
    for name, source in sources.items():
        path = root / "rrcm" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_imports(root)


@pytest.mark.parametrize(
    ("name", "source", "way"),
    [
        ("utils__files", "from rrcm.config import Config", "upwards from rrcm.config.Config"),
        ("data__loader", "def f():\n    from rrcm import models", "sideways from rrcm.models"),
        ("data__loader", "import rrcm.models.vit", "sideways from rrcm.models.vit"),
        ("config", "from .cli import main", "upwards from rrcm.cli.main"),
        ("config", "from rrcm.models import vit", "upwards from rrcm.models.vit"),
        ("config", "from rrcm.models.denoised import SETTINGS", "upwards from rrcm.models.denoised.SETTINGS"),
        ("models__vit", "from ..evaluation.attack import attack", "upwards from rrcm.evaluation.attack.attack"),
        (
            "models__load",
            "import importlib\nimportlib.import_module('rrcm.training.optim')",
            "upwards from rrcm.training",
        ),
        ("evaluation__attack", "from rrcm import rrcm_loss", "upwards from rrcm.rrcm_loss"),
    ],
)
def test_a_planted_import_in_the_wrong_direction_is_found(tmp_path, name, source, way):
    (wrong,) = wrong_directions(write_package(tmp_path, **{name: source, "cli": "from rrcm.report import build"}))
    assert way in wrong and wrong.startswith(f"rrcm/{name.replace('__', '/')}.py:")


def test_a_planted_cycle_is_found(tmp_path):
    imports = write_package(
        tmp_path,
        data__a="from rrcm.data.b import f",
        data__b="def f():\n    from rrcm.data import c",
        data__c="import rrcm.data.a\nfrom rrcm.utils import files",
    )
    modules = {"rrcm.data.a", "rrcm.data.b", "rrcm.data.c", "rrcm.utils.files"}
    assert set(find_cycle(imports, modules)) == {"rrcm.data.a", "rrcm.data.b", "rrcm.data.c"}
    assert not find_cycle(imports[1:], modules)


def test_planted_drawing_is_found(tmp_path):
    sources = {"models__vit": "from matplotlib import pyplot", "report__figures": "import matplotlib.pyplot"}
    assert len(imports_of(write_package(tmp_path, **sources), DRAWING, allowed=("rrcm.report",))) == 1


def test_the_package_is_one_level_deep():
    deeper = {module for module in MODULES if module.count(".") > 2}
    assert not deeper and all((package / "__init__.py").is_file() for package in PACKAGES)
    folders = {path.parent for path in (REPOSITORY / "rrcm").glob("*/*.py")}
    assert folders == set(PACKAGES), "a folder without __init__.py"


def test_every_module_says_what_it_is():
    bare = []
    for path in sorted((REPOSITORY / "rrcm").rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if not docstring or "TODO" in docstring:
            bare.append(str(path.relative_to(REPOSITORY)))
    assert not bare, "without a docstring: " + ", ".join(bare)


def test_tests_mirror_the_packages():
    folders = {path.parent.name for path in (REPOSITORY / "tests").glob("*/test_*.py")}
    assert folders == {package.name for package in PACKAGES}


def test_functions_are_short():
    files = [path for folder in ("rrcm", "stages") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    long = [line for path in files for line in long_functions(path)]
    assert not long, "\n" + "\n".join(long)


@pytest.mark.parametrize(
    ("head", "lines", "found"),
    [
        ("def f():", MAX_LINES, 0),
        ("def f():", MAX_LINES + 1, 1),
        ("def f():  # long because it is a table", MAX_LINES + 1, 0),
        ('def f():\n    """A table, long because\n    it has many rows."""', MAX_LINES + 1, 0),
        ('async def f():\n    """A table."""', MAX_LINES + 1, 1),
    ],
)
def test_a_planted_long_function_is_found(tmp_path, head, lines, found):
    path = tmp_path / "long.py"
    path.write_text(head + "\n    x = 1" * (lines - 1 - head.count("\n")) + "\n")
    assert len(list(long_functions(path))) == found


@pytest.mark.parametrize("name", PRELOAD)
def test_preloaded_modules_exist(name):
    """The forkserver skips unknown names without a word; every stage would then do its own slow imports."""
    assert importlib.util.find_spec(name)
