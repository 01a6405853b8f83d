"""Fingerprints of code: what an edit may change, under every version of Python."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from rrcm.utils.code import essence, fingerprint_of, fingerprints
from rrcm.utils.registry import Registry

SOURCE = '''"""A module."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rrcm.utils.errors import RRCMError

if TYPE_CHECKING:
    from rrcm.config import Config

FOLDER_LOADERS = Registry({"one": "a:b"})


class Point:
    """A class."""

    x: float
    y: float = 0.0  # a comment

    def norm(self, scale: float = 1.0) -> float:
        """A method."""
        square: float = self.x**2 + self.y**2
        if square < 0:
            raise RRCMError(f"{self.x}: is {square:.3f} small")
        return scale * math.sqrt(square)


def mean(values: Mapping[str, float], path: Path | None = None) -> "Config":
    text = f"{path} has {len(values)} values"
    return np.mean(list(values.values())), text
'''


def fingerprint(source: str, is_package: bool = False) -> str:
    return fingerprint_of(essence(ast.parse(source), is_package))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another one, which is longer"),
        ('"""A module."""', '"""Another."""'),
        ('        """A method."""\n', ""),
        ("y: float = 0.0", "y: int = 0.0"),
        ("scale: float = 1.0) -> float", "scale=1.0)"),
        ("square: float = ", "square = "),
        ("import math\nfrom collections.abc import Mapping", "from collections.abc import Mapping\nimport math"),
        ("values: Mapping[str, float], path: Path | None = None", "values, path=None"),
        ("from pathlib import Path\n", ""),
        ("    from rrcm.config import Config", "    from rrcm.config import Config, Section"),
        ('{"one": "a:b"}', '{"one": "a:b", "two": "a:c"}'),
        ("is {square:.3f} small", "has {square} as its square; make it larger"),
        ("scale * math.sqrt(square)", "(scale *\n            math.sqrt(square))"),
        ('"""A class."""', "'A class.'"),
    ],
)
def test_an_edit_of_how_it_is_written_changes_nothing(old, new):
    assert SOURCE.count(old) == 1
    assert fingerprint(SOURCE.replace(old, new)) == fingerprint(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.x**2 + self.y**2", "self.x**2 - self.y**2"),
        ("y: float = 0.0", "y: float = 0"),
        ("    x: float\n", ""),
        ("scale: float = 1.0", "scale: float = 2.0"),
        ("scale: float = 1.0", "factor: float = 1.0"),
        ("if square < 0", "if square <= 0"),
        ("raise RRCMError", "raise ValueError"),
        ("has {len(values)} values", "holds {len(values)} values"),
        ("import numpy as np", "import scipy as np"),
        ("FOLDER_LOADERS = Registry", "NETWORKS = Registry"),
        ("return np.mean(list(values.values())), text", "return text, np.mean(list(values.values()))"),
    ],
)
def test_an_edit_of_what_it_does_changes_the_fingerprint(old, new):
    assert SOURCE.count(old) == 1
    assert fingerprint(SOURCE.replace(old, new)) != fingerprint(SOURCE)


def test_a_package_may_import_for_others():
    assert fingerprint("from math import pi\n") == fingerprint("")
    assert fingerprint("from math import pi\n", is_package=True) != fingerprint("")


def test_what_only_annotations_need_is_not_followed():
    """An objective names the network in its signature only, so it does not depend on it."""
    found = fingerprints("rrcm.objectives.gaussian")
    assert "rrcm.objectives.base" in found and "rrcm.models.vit" not in found
    assert "rrcm.models.vit" in fingerprints("rrcm.objectives.contrastive")


def test_modules_can_be_left_out_with_what_only_they_import():
    whole, part = (
        fingerprints("rrcm.objectives.gaussian"),
        fingerprints("rrcm.objectives.gaussian", without=["rrcm.utils.rng"]),
    )
    assert whole.keys() - part.keys() == {"rrcm.utils.rng", "rrcm.utils.philox"}
    assert part.items() <= whole.items()


OTHERS = {shutil.which(f"python3.{minor}") for minor in range(11, 16)} - {None, sys.executable}
OTHERS |= {str(path) for path in Path.home().glob(".pyenv/versions/3.1[1-9]*/bin/python")}


@pytest.mark.skipif(not OTHERS, reason="there is one Python here")
@pytest.mark.parametrize("python", sorted(OTHERS))
def test_every_version_of_python_gives_the_same_fingerprints(python):
    """A clone with another version must not run anything again. Versions split the parts of f-strings differently."""
    code = "import json, sys; from rrcm.utils.code import *; print(json.dumps([fingerprints('rrcm.training.finetune'), "
    code += "fingerprint_of(essence(ast.parse(sys.argv[1])))]))"
    source = SOURCE + "F = f'{1}' 'a' f'' f'b{2!r:>{3}}' + f'{{}}' + 'x' 'y'\n"
    answer = subprocess.run([python, "-c", code, source], capture_output=True, text=True, cwd=REPOSITORY)
    if answer.returncode == 127:
        pytest.skip("a name of another program, which finds no Python")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == [fingerprints("rrcm.training.finetune"), fingerprint(source)]


@pytest.mark.slow
def test_a_registry_imports_what_is_asked_for():
    code = "import sys; from rrcm.objectives import FINETUNING; FINETUNING['gaussian']; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = {name for name in answer.stdout.split() if name.startswith("rrcm.objectives.")}
    assert loaded == {"rrcm.objectives.base", "rrcm.objectives.gaussian"}


def test_a_registry_holds_names_objects_and_options():
    registry = Registry({"pi": "math:pi", "hex": ("builtins:int", {"base": 16}), "own": len})
    assert registry["pi"] == 3.141592653589793 and registry["hex"]("ff") == 255 and registry["own"] is len
    assert [registry.module(name) for name in registry] == ["math", "builtins", "builtins"]
    assert registry.get("missing") is None and "pi" in registry and dict(registry)["own"] is len
    with pytest.raises(KeyError):
        registry["missing"]
