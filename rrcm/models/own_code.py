"""Base classifiers from the user's own code: `module:function`, `file.py:function`, or a program of torch.export.

Apart from plug-ins, this is the only place that runs code from outside this package and its libraries. It runs only
code that the user names on the command line, and says so on stderr.
"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from rrcm.models.base_classifiers import BaseClassifier
from rrcm.models.folders import CONFIG
from rrcm.models.kinds import LoadedClassifier
from rrcm.models.load import LoadedCascade, _read_class_names, load_base_classifier, load_cascade
from rrcm.models.timm_models import FOLDER, HUB
from rrcm.utils.errors import RRCMError, failure_of, one_line, printable
from rrcm.utils.files import expand_user
from rrcm.utils.quiet import quiet
from rrcm.utils.tensors import load_tensors, load_weights

NAME = re.compile(r"(?P<place>[^:]+\.py|[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<function>[^\W\d]\w*)")
EXAMPLE = "such as model.image_size = 224"
PROGRAM, ONNX, NAMES = ".pt2", ".onnx", "classes.txt"  # suffixes of programs; names of classes beside one


def is_own_code(model: Path | str) -> bool:
    """Whether `model` names a function, `module:function` or `file.py:function`, or is a program of torch.export."""
    name = str(model)
    if name.endswith(PROGRAM) and expand_user(name).is_file():
        return True
    return not name.startswith(HUB) and NAME.fullmatch(name) is not None and not Path(name).exists()


def load_named_classifier(
    model: Path | str, *, sigma: float | None = None, weights: Path | None = None, **options: object
) -> LoadedClassifier:
    """`load_base_classifier` that also takes models of the user's own code. Raises `RRCMError` for the same reasons."""
    if not is_own_code(model):
        refuse_missing(model)
        if sigma is None and expand_user(model).is_file():
            load_tensors(expand_user(model))  # says what is wrong with the file before a sigma is asked for
        return load_base_classifier(model, sigma=sigma, weights=weights, **options)
    if not options.pop("final_norm", True):
        raise RRCMError(f"{model}: only an authors' checkpoint file can skip the final norm; leave that option out")
    return _at(load_own_code(str(model), weights=weights, classes=options.get("classes")), sigma)


def load_named_cascade(models: Sequence[Path | str], sigmas: Sequence[float], **options: object) -> LoadedCascade:
    """`load_cascade` that also takes models of the user's own code. Raises `RRCMError` for the same reasons."""
    if not any(map(is_own_code, models)):
        for model in models:
            refuse_missing(model)
        return load_cascade(models, sigmas, **options)
    if not sigmas:
        raise RRCMError(f"{models[0]}: its sigmas are not known; give the sigmas of the cascade")
    if len(models) not in (1, len(sigmas)):
        raise RRCMError(f"{len(models)} models for {len(sigmas)} sigmas: give one model, or one for each sigma")
    if len(models) == 1:
        loaded = load_named_classifier(models[0], **options)
        return LoadedCascade([_at(loaded, sigma) for sigma in sigmas], list(sigmas), False)
    pairs = zip(models, sigmas, strict=True)
    scales = [load_named_classifier(model, sigma=sigma, **options) for model, sigma in pairs]
    for model, loaded in zip(models, scales, strict=True):
        if loaded[1:] != scales[0][1:]:
            other = f"has another image size, other channels or other classes than {models[0]}"
            raise RRCMError(f"{model}: {other}; give models for the same images")
    return LoadedCascade(scales, list(sigmas), False)


def refuse_missing(model: Path | str) -> None:
    """Raise `RRCMError` for folders that hold no model, for missing folders of this repository, and for ONNX files.

    Any other name that is no file may be the name of a timm model.
    """
    folder = expand_user(str(model).removeprefix(FOLDER))
    if folder.is_dir() and not (folder / CONFIG).exists():
        advice = "give a folder that `rrcm train`, the pipeline or timm wrote"
        raise RRCMError(f"{printable(model)}: is no folder of a model, as it has no {CONFIG}; {advice}")
    if folder.suffix == ONNX and folder.is_file():
        advice = "export the model with --format torch-export, or give a function that returns a torch module"
        raise RRCMError(f"{printable(model)}: a program of ONNX, which cannot be certified here; {advice}")
    if folder.parts[:1] == ("models",) and not folder.exists():
        fetched = f"in a clone of the repository, `dvc pull {printable(folder)}` fetches the published one"
        raise RRCMError(f"{printable(model)}: no such folder; {fetched}, and `make repro` trains it")


def load_own_code(name: str, *, weights: Path | None = None, classes: Path | None = None) -> LoadedClassifier:
    """Call the function `name` without arguments, and describe the base classifier that it returns.

    `name` may also be a program of torch.export, as `rrcm export` writes it.

    It returns a torch module that maps images in [0, 1] to logits, or a `LoadedClassifier`. A module has the attribute
    `image_size`, the side of its images in pixels, and may have `channels` (3 without it), `class_names` and
    `num_classes`. The file `weights` has a state dict for the module, and `classes` one class name per line.

    Raises `RRCMError` if the code cannot be run, returns something else, or has other weights.
    """
    if name.endswith(PROGRAM):
        return _load_program(name, weights, classes)
    answer = _run(name, _find_function(name))
    module = answer.classifier if isinstance(answer, LoadedClassifier) else answer
    if not isinstance(module, nn.Module):
        raise RRCMError(f"{name}: returns a {type(module).__name__}; let it return a torch.nn.Module")
    if weights is not None:
        load_weights(module, load_tensors(expand_user(weights)), weights)
    with suppress(NotImplementedError):  # exported programs have no modes
        module.eval()
    loaded = answer if isinstance(answer, LoadedClassifier) else _describe(name, module, classes)
    return loaded if classes is None else loaded._replace(class_names=_read_class_names(classes, loaded.num_classes))


def _load_program(name: str, weights: Path | None, classes: Path | None) -> LoadedClassifier:
    """A program of torch.export that maps images (B, C, S, S) to logits (B, K). `NAMES` beside it may name classes."""
    path = expand_user(name)
    if weights is not None:
        raise RRCMError(f"{weights}: weights are for a timm model, and {name} has its own; leave them out")
    print(f"note: runs your code: the program {printable(path)}", file=sys.stderr)
    try:
        with quiet():
            program = torch.export.load(path)
    except Exception as error:  # of each kind of damage another
        raise RRCMError(f"{name}: is no program of torch.export ({one_line(error)}); export it again") from None
    given, returned = ([tuple(each.shape) for each in found] for found in _ends(program))
    fits = [len(each) for each in (given, *given, returned, *returned)] == [1, 4, 1, 2]
    shape = [*given[0][1:], returned[0][1]] if fits else []
    if not all(type(each) is int for each in shape) or not fits or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise RRCMError(
            f"{name}: maps {given or 'nothing'} to {returned or 'nothing'}; must map images (B, C, S, S) of one "
            "size, with 1 or 3 channels, to logits (B, K)"
        )
    beside = path.with_name(NAMES)
    listed = classes or (beside if beside.is_file() else None)
    channels, size, _, count = shape
    names = [str(number) for number in range(count)] if listed is None else _read_class_names(listed, count)
    return LoadedClassifier(program.module(), size, channels, names)


def _ends(program: torch.export.ExportedProgram) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The inputs of a program and its outputs, as tensors without values."""
    nodes, signature = {node.name: node for node in program.graph.nodes}, program.graph_signature
    names = (signature.user_inputs, signature.user_outputs)
    inputs, outputs = ([nodes[name].meta["val"] for name in each if name in nodes] for each in names)
    return inputs, outputs


def _at(loaded: LoadedClassifier, sigma: float | None) -> LoadedClassifier:
    """The classifier for noise `sigma`, if it is a `BaseClassifier` that has not been trained for a certain noise."""
    classifier = loaded.classifier
    if sigma is None or not isinstance(classifier, BaseClassifier) or classifier.sigma is not None:
        return loaded
    return loaded._replace(classifier=classifier.at(sigma))


def _find_function(name: str) -> Callable[[], object]:
    place, function = NAME.fullmatch(name).groups()
    path = expand_user(place)
    if place.endswith(".py") and not path.is_file():
        raise RRCMError(f"{name}: there is no file {printable(place)}; give FILE.py:FUNCTION or MODULE:FUNCTION")
    print(
        f"note: runs your code: {function}() of {printable(path if place.endswith('.py') else place)}", file=sys.stderr
    )
    module = _run(name, lambda: _import_file(path) if place.endswith(".py") else _import_module(place))
    found = getattr(module, function, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise RRCMError(f"{name}: has no function {function}; it has {', '.join(own[:10]) or 'none'}")
    return found


def _import_module(name: str) -> ModuleType:
    """A module of the environment or of the working directory."""
    sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    """A file as a module, which can import the files beside it."""
    sys.path.insert(0, str(path.parent.absolute()))
    specification = importlib.util.spec_from_file_location(f"own_code_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look it up
    specification.loader.exec_module(module)
    return module


def _run(name: str, function: Callable[[], object]) -> object:
    """The result of the user's code. Raises an `RRCMError` that says where it failed."""
    try:
        return function()
    except RRCMError:
        raise
    except Exception as error:  # code of the user raises anything
        raise RRCMError(f"{name}: {failure_of(error)}; correct it") from error


def _describe(name: str, module: nn.Module, classes: Path | None) -> LoadedClassifier:
    size, channels = getattr(module, "image_size", None), getattr(module, "channels", 3)
    if not isinstance(size, int) or size < 1:
        problem = f"has the image_size {size!r}" if size is not None else "has no attribute image_size"
        raise RRCMError(f"{name}: its module {problem}; set it to the side of its images in pixels, {EXAMPLE}")
    if channels not in (1, 3):
        raise RRCMError(f"{name}: its module has the channels {channels!r}; must be 1 or 3")
    names = getattr(module, "class_names", None)
    if names is None:
        given = getattr(module, "num_classes", None)
        count = given if isinstance(given, int) else _count_classes(name, module, torch.zeros(2, channels, size, size))
        names = [str(number) for number in range(count)]
    return LoadedClassifier(module, size, channels, [str(each) for each in names])


def _count_classes(name: str, module: nn.Module, images: torch.Tensor) -> int:
    """How many logits the module returns for an image."""
    with torch.no_grad():
        logits = _run(name, lambda: module(images))
    logits = getattr(logits, "logits", logits)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != len(images):
        said = tuple(shape) if shape is not None else f"a {type(logits).__name__}"
        raise RRCMError(f"{name}: its module returns {said} for 2 images; let it return logits (2, K)")
    return shape[1]
