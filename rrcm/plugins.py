"""Plug-ins: losses, data sets, classifiers and methods of the user's own package, found by the setting `plugin`.

A plug-in is a module that declares them under the names of `REGISTRIES` and as rows of the method table, `METHODS`.
README.md in rrcm/ has an example. The setting is code that the user names, so it is imported.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from rrcm.methods import add_methods
from rrcm.models import FOLDER_LOADERS, TRAINED_CLASSIFIERS
from rrcm.objectives import FINETUNING
from rrcm.sources import DATASETS
from rrcm.utils.errors import RRCMError, failure_of, printable

# The registries that a plug-in may add to, by the name under which it declares its entries.
REGISTRIES = {
    "DATASETS": DATASETS,
    "FINETUNING": FINETUNING,
    "TRAINED_CLASSIFIERS": TRAINED_CLASSIFIERS,
    "FOLDER_LOADERS": FOLDER_LOADERS,
}
NOTHING = "stages"  # for DVC to watch without a plug-in: it watches that folder anyway
_used: set[str] = set()


def use_plugin(name: str) -> None:
    """Import the module `name` and add what it declares to the registries and to the method table.

    A second call does nothing. Raises `RRCMError` for a module that cannot be imported or declares nothing, and for a
    name that is taken.
    """
    if name in _used:
        return
    module = _import(name)
    declared = {key: getattr(module, key) for key in (*REGISTRIES, "METHODS") if hasattr(module, key)}
    if not declared:
        raise RRCMError(f"plugin {name}: declares nothing; give it {', '.join(REGISTRIES)} or METHODS")
    table = declared.pop("METHODS", "")
    for key, entries in {"METHODS": table, **declared}.items():
        kind = str if key == "METHODS" else dict
        if not isinstance(entries, kind):
            raise RRCMError(f"plugin {name}: {key} is a {type(entries).__name__}; must be a {kind.__name__}")
    for key, entries in declared.items():
        if taken := [entry for entry in entries if entry in REGISTRIES[key]]:
            raise RRCMError(f"plugin {name}: {key} has {taken[0]!r}, which is taken; choose another name")
        if wrong := [entry for entry in entries.values() if not isinstance(entry, str)]:
            raise RRCMError(f'plugin {name}: {key} has {wrong[0]!r}; name it as "package.module:object"')
    add_methods(table, f"plugin {name}")
    for key, entries in declared.items():
        REGISTRIES[key].update(entries)
    _used.add(name)
    # The stages import the rest of the package later. DVC would mistake compiled files in its folder for an edit.
    sys.dont_write_bytecode = True


def plugin_path(name: str | None) -> str:
    """The file or folder of a plug-in's package, which DVC watches. It is NOTHING without a plug-in."""
    if name is None:
        return NOTHING
    use_plugin(name)
    package = sys.modules[name.partition(".")[0]]
    path = Path(next(iter(getattr(package, "__path__", [])), None) or package.__file__).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _import(name: str) -> ModuleType:
    try:
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise RRCMError(f"plugin {name}: {failure_of(error)}; install that, or correct the plug-in") from error
        raise RRCMError(
            f"plugin {printable(name)}: there is no module {printable(error.name)}; install its package (pip install "
            "-e FOLDER), or put the folder that it is in on PYTHONPATH"
        ) from None
    except Exception as error:  # code of the user raises anything
        raise RRCMError(f"plugin {printable(name)}: {failure_of(error)}; correct it") from error
    finally:
        sys.dont_write_bytecode = before
