"""Load a base classifier from a model folder, a checkpoint file of the paper's authors, or as a timm model."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rrcm.models.authors import load_authors_checkpoint
from rrcm.models.base_classifiers import NoiseConditionedClassifier, Normalized
from rrcm.models.checkpoints import describe_classifier
from rrcm.models.folders import read_model_config
from rrcm.models.joint import read_joint
from rrcm.models.kinds import LoadedClassifier, load_model_folder, load_scales
from rrcm.models.timm_models import FOLDER, HUB, class_names, is_snapshot, load_timm, suggest_timm_name
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import expand_user, read_text


class LoadedCascade(NamedTuple):
    """The base classifiers of a cascade."""

    scales: list[LoadedClassifier]  # by increasing sigma
    sigmas: list[float]  # pixel units
    can_pass: bool  # whether all but the first have one more output, "pass"


def load_base_classifier(
    model: Path | str,
    *,
    sigma: float | None = None,  # pixel noise; authors' files do not record it, and joint models need it
    weights: Path | None = None,  # file with the weights of a timm model, in place of a download
    final_norm: bool = True,  # False: the authors' CIFAR-10 models, which skip the last LayerNorm
    classes: Path | None = None,  # text file with one class name per line
    outside_range: bool = False,  # allow a sigma that a joint training did not cover
) -> LoadedClassifier:
    """Load a model folder, a timm snapshot folder, a checkpoint file of the authors, or a timm model by its name.

    Raises `RRCMError` if `model` is none of these, cannot be read or downloaded, or conflicts with another argument.

    >>> loaded = rrcm.load_base_classifier("models/rrcm/sigma_0.5")
    >>> loaded.num_classes, loaded.image_size, loaded.sigma
    (10, 8, 0.5)
    """
    path = expand_user(str(model).removeprefix(FOLDER))
    if weights is not None and path.exists():
        raise RRCMError(f"{weights}: weights are for a timm model, and {model} has its own; leave them out")
    if not final_norm and not path.is_file():
        raise RRCMError(f"{model}: only an authors' checkpoint file can skip the final norm; leave that option out")
    if path.is_dir() and is_snapshot(path):
        loaded = _load_timm(str(path), None)
    elif path.is_dir():
        loaded = load_model_folder(path, sigma=sigma, outside_range=outside_range)
    elif path.exists():
        loaded = _load_authors(path, sigma, final_norm)
    else:
        loaded = _load_timm(str(model), weights)
    return loaded if classes is None else loaded._replace(class_names=_read_class_names(classes, loaded.num_classes))


def load_cascade(
    models: Sequence[Path | str],
    sigmas: Sequence[float] = (),  # pixel units, increasing; none: those for which the models were trained
    *,
    classes: Path | None = None,  # text file with one class name per line
    outside_range: bool = False,  # allow sigmas that a joint training did not cover
) -> LoadedCascade:
    """Load one model for all sigmas, or one for each of them in the same order, as `load_base_classifier` does.

    Raises `RRCMError` as that function does, for another number of models, for a single model that was trained for one
    sigma, for models of different images or classes, and for sigmas that are neither given nor known.
    """
    if len(models) == 1 and len(sigmas) != 1:
        return _load_for_all(models[0], sigmas, classes, outside_range)
    if sigmas and len(models) != len(sigmas):
        raise RRCMError(f"{len(models)} models for {len(sigmas)} sigmas: give one model, or one for each sigma")
    pairs = zip(models, sigmas or [None] * len(models), strict=True)
    options = {"classes": classes, "outside_range": outside_range}
    scales = [load_base_classifier(model, sigma=sigma, **options) for model, sigma in pairs]
    for model, loaded in zip(models, scales, strict=True):
        if loaded[1:] != scales[0][1:]:
            other = f"has another image size, other channels or other classes than {models[0]}"
            raise RRCMError(f"{model}: {other}; give models for the same images")
        if loaded.sigma is None and not sigmas:
            raise RRCMError(f"{model}: was not trained for a particular noise; give the sigma of each model")
    return LoadedCascade(scales, list(sigmas) or [loaded.sigma for loaded in scales], False)


def _load_for_all(
    model: Path | str, sigmas: Sequence[float], classes: Path | None, outside_range: bool
) -> LoadedCascade:
    """`load_cascade` for a single model."""
    path, can_pass = expand_user(str(model).removeprefix(FOLDER)), False
    folder = path.is_dir() and not is_snapshot(path)
    joint = read_joint(path, read_model_config(path)) if folder else None
    if not sigmas and joint is None:
        raise RRCMError(f"{model}: is no joint model, whose sigmas are known; give the sigmas of the cascade")
    sigmas = list(sigmas or joint.sigmas)
    if folder:
        scales, can_pass = load_scales([path], sigmas, outside_range=outside_range)
    else:
        scales = [load_base_classifier(model, sigma=sigmas[0])] * len(sigmas)
    if joint is None and (trained_for := scales[0].sigma) is not None:
        raise RRCMError(
            f"{model}: was trained for sigma {trained_for:g} alone; give a joint model, or one for each sigma"
        )
    if classes is not None:
        names = _read_class_names(classes, len(scales[0].class_names))
        scales = [loaded._replace(class_names=names) for loaded in scales]
    return LoadedCascade(scales, sigmas, can_pass)


def class_folders(loaded: LoadedClassifier, *, numbers: bool = True) -> dict[str, int]:
    """Folder names that identify a class: its name if that is unique, its synset, or its number.

    Numbers identify classes only if no class has a number as its name (class 10 might be called 11), and only if
    `numbers` is true.
    """
    names, synsets = (
        [unicodedata.normalize("NFC", name) for name in each] for each in (loaded.class_names, loaded.synsets)
    )
    count = Counter(names)
    folders = {name: number for number, name in enumerate(names) if count[name] == 1}
    folders |= {synset: number for number, synset in enumerate(synsets)}
    if numbers and not any(name.isdecimal() for name in names + synsets):
        folders |= {str(number): number for number in range(loaded.num_classes)}
    return folders


def _load_authors(path: Path, sigma: float | None, final_norm: bool) -> LoadedClassifier:
    if sigma is None:
        raise RRCMError(f"{path}: does not record the noise it was fine-tuned for; give sigma, in pixel units")
    classifier = load_authors_checkpoint(path, sigma=sigma, final_norm=final_norm)
    if not isinstance(classifier, NoiseConditionedClassifier):
        raise RRCMError(f"{path}: a pre-trained network has no classes; use a fine-tuned one")
    classifier.sigma = sigma  # t is the nearest level of the authors' grid, so t / 2 may differ
    loaded = describe_classifier(classifier)
    return _with_imagenet_names(loaded, "imagenet-1k") if loaded.num_classes == 1000 else loaded


def _load_timm(name: str, weights: Path | None) -> LoadedClassifier:
    from timm.data import infer_imagenet_subset, resolve_model_data_config  # timm takes seconds to import

    known = name.startswith((*HUB, FOLDER)) or Path(name).is_dir()
    if not known and (complaint := suggest_timm_name(name)):
        raise RRCMError(f"{name}: no such folder or file, and {complaint}")
    network = load_timm(name, weights)
    if network.num_classes < 2:
        raise RRCMError(f"{name}: has {network.num_classes} classes; certify a model that was fine-tuned for classes")
    config = resolve_model_data_config(network)
    channels, height, width = config["input_size"]
    stem = getattr(network, "patch_embed", None)
    if getattr(stem, "img_size", None):  # its position embedding; its configuration may give another size
        height, width = stem.img_size
    if channels not in (1, 3) or height != width:
        raise RRCMError(f"{name}: takes images of {channels} x {height} x {width}: must be square, of 1 or 3 channels")
    classifier = Normalized(network, network.num_classes, config["mean"], config["std"]).eval()
    numbers = [str(number) for number in range(network.num_classes)]
    loaded = LoadedClassifier(classifier, height, channels, numbers)
    if names := class_names(network, name):
        return loaded._replace(class_names=names[0], synsets=names[1])
    subset = infer_imagenet_subset(network)
    return _with_imagenet_names(loaded, subset) if subset else loaded


def _with_imagenet_names(loaded: LoadedClassifier, subset: str) -> LoadedClassifier:
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    names = [info.index_to_description(k).split(",")[0] for k in range(info.num_classes())]
    return loaded._replace(class_names=names, synsets=info.label_names())


def _read_class_names(path: Path, count: int) -> list[str]:
    try:
        names = read_text(expand_user(path)).splitlines()
    except (OSError, ValueError) as error:
        raise RRCMError(f"{path}: cannot be read as text ({one_line(error)}); give one class name per line") from None
    names = [name.strip() for name in names if name.strip()]
    if len(names) != count:
        raise RRCMError(
            f"{path}: has {len(names)} class names, the model {count} classes; give one per line, in the model's order"
        )
    return names
