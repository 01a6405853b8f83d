"""Load a base classifier from a model folder, a checkpoint file of the paper's authors, or as a timm model.

A model folder is the contract between training and certification. Its config.json has a `kind`, and KINDS has a loader
for each kind. Code outside the package adds a kind with `KINDS["my kind"] = my_loader`.
"""

import inspect
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rrcm.models.architectures import network_classifier
from rrcm.models.authors import load_authors_checkpoint
from rrcm.models.base_classifiers import BaseClassifier, NoiseConditionedClassifier, Normalized
from rrcm.models.checkpoints import check_kind, class_names_of, classifier_of, read_model_config
from rrcm.models.denoised import DENOISED
from rrcm.models.denoiser import load_denoiser
from rrcm.models.ensembles import Ensemble
from rrcm.models.timm_models import FOLDER, HUB, class_names, is_snapshot, load_timm, suggest_timm_name
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import expand_user, read_text, sha256_folder
from rrcm.utils.tensors import load_tensors, load_weights, sha256_tensors


class LoadedClassifier(NamedTuple):
    """A base classifier and the facts needed to certify images with it."""

    classifier: BaseClassifier  # in eval mode
    image_size: int  # side of its square input, pixels
    channels: int  # 1 or 3
    class_names: list[str]
    synsets: list[str] = []  # noqa: RUF012 (never changed); short unique names: of ImageNet classes, its folders

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def sigma(self) -> float | None:
        """The pixel noise that the classifier was trained for, if known."""
        return getattr(self.classifier, "sigma", None)


def load_base_classifier(
    model: Path | str,
    *,
    sigma: float | None = None,  # pixel noise; the authors' files do not record it
    weights: Path | None = None,  # file with a timm model's weights, instead of a download
    final_norm: bool = True,  # False: the authors' CIFAR-10 models, which skip the last LayerNorm
    classes: Path | None = None,  # text file with one class name per line
) -> LoadedClassifier:
    """Load a model folder or a timm snapshot folder, a file as an authors' checkpoint, or else a timm model by name.

    Raises `RRCMError` when `model` is none of these, cannot be read or downloaded, or conflicts with another argument.
    """
    path = expand_user(str(model).removeprefix(FOLDER))
    if weights is not None and path.exists():
        raise RRCMError(f"{weights}: weights are for a timm model, and {model} has its own; leave them out")
    if not final_norm and not path.is_file():
        raise RRCMError(f"{model}: only an authors' checkpoint file can skip the final norm; leave that option out")
    if path.is_dir() and is_snapshot(path):
        loaded = _load_timm(str(path), None)
    elif path.is_dir():
        loaded = load_model_folder(path)
    elif path.exists():
        loaded = _load_authors(path, sigma, final_norm)
    else:
        loaded = _load_timm(str(model), weights)
    return loaded if classes is None else loaded._replace(class_names=_read_class_names(classes, loaded.num_classes))


def load_model_folder(folder: Path | str) -> LoadedClassifier:
    """Load the classifier in a model folder of any kind in KINDS.

    Raises `RRCMError` for a missing or damaged folder and for an unknown kind.
    """
    folder = Path(folder)
    config = read_model_config(folder)
    check_kind(folder, config, KINDS)
    return KINDS[config["kind"]](folder, config)


def class_folders(loaded: LoadedClassifier) -> dict[str, int]:
    """Folder names that identify a class: its name where no other class has the same, its synset, or its number.

    Numbers identify classes only if no class has a number as its name, since class 10 may be called 11.
    """
    names, synsets = (
        [unicodedata.normalize("NFC", name) for name in each] for each in (loaded.class_names, loaded.synsets)
    )
    count = Counter(names)
    folders = {name: number for number, name in enumerate(names) if count[name] == 1}
    folders |= {synset: number for number, synset in enumerate(synsets)}
    if not any(name.isdecimal() for name in names + synsets):
        folders |= {str(number): number for number in range(loaded.num_classes)}
    return folders


def _load_classifier_folder(folder: Path, config: dict) -> LoadedClassifier:
    return _describe(classifier_of(folder, config), config["class_names"])


def _load_network_folder(folder: Path, config: dict) -> LoadedClassifier:
    names, architecture = class_names_of(folder, config), config.get("architecture")
    try:
        classifier = network_classifier(architecture, len(names), float(config["sigma"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RRCMError(f"{folder}/config.json: describes no network ({one_line(error)}); train it again") from None
    load_weights(classifier, load_tensors(folder / "model.safetensors"), folder)
    return LoadedClassifier(classifier.eval(), architecture["image_size"], architecture["channels"], names)


def _load_ensemble(folder: Path, config: dict) -> LoadedClassifier:
    parts = config.get("members")
    if not (isinstance(parts, list) and len(parts) >= 2 and all(isinstance(part, dict) for part in parts)):
        raise RRCMError(f"{folder}/config.json: members must be two or more folders with their hashes; train it again")
    members = []
    for part in parts:
        path = _part_folder(folder, part)
        members.append(load_model_folder(path))
        for name in ("class_names", "image_size", "channels"):
            found, first = getattr(members[-1], name), getattr(members[0], name)
            if found != first:
                raise RRCMError(f"{path}: has {name} {found}, the first member {first}; members must be alike")
    return members[0]._replace(classifier=Ensemble([member.classifier for member in members]).eval())


def _load_denoised(folder: Path, config: dict) -> LoadedClassifier:
    parts, names = config.get("parts"), class_names_of(folder, config)
    try:
        denoiser, part = parts["denoiser"], parts["classifier"]
        build = partial(DENOISED[config["denoised"]], sigma=float(config["sigma"]), **config["settings"])
        inspect.signature(build).bind(None, None, classifier_size=None)
    except (KeyError, TypeError, ValueError) as error:
        raise RRCMError(f"{folder}/config.json: describes no parts ({one_line(error)}); train it again") from None
    denoiser = load_denoiser(_part_folder(folder, denoiser))
    if "model" in part:
        loaded = load_base_classifier(part["model"])
        if sha256_tensors(loaded.classifier.state_dict()) != part.get("sha256"):
            raise RRCMError(f"{part['model']}: has other weights than {folder}/config.json names; train it again")
    else:
        loaded = load_model_folder(_part_folder(folder, part))
    fits = loaded.channels == denoiser.channels and loaded.num_classes == len(names)
    if not fits or loaded.classifier.stochastic:  # nobody hands it random numbers
        raise RRCMError(f"{folder}/config.json: its denoiser and its classifier do not fit; train it again")
    classifier = build(denoiser, loaded.classifier, classifier_size=loaded.image_size).eval()
    return loaded._replace(classifier=classifier, image_size=denoiser.image_size, class_names=names)


def _part_folder(folder: Path, part: Mapping) -> Path:
    """The model folder that is part of another. Raises `RRCMError` if its content is not what it was."""
    path = folder / str(part.get("path"))
    if sha256_folder(path) != part.get("sha256"):
        raise RRCMError(f"{path}: is not the part that {folder}/config.json names; train it again or dvc pull")
    return path


def _describe(classifier: NoiseConditionedClassifier, class_names: list[str] | None = None) -> LoadedClassifier:
    encoder = classifier.encoder
    numbers = [str(number) for number in range(classifier.num_classes)]
    return LoadedClassifier(classifier, encoder.patch_embed.img_size[0], encoder.in_chans, class_names or numbers)


def _load_authors(path: Path, sigma: float | None, final_norm: bool) -> LoadedClassifier:
    if sigma is None:
        raise RRCMError(f"{path}: does not record the noise it was fine-tuned for; give sigma, in pixel units")
    classifier = load_authors_checkpoint(path, sigma=sigma, final_norm=final_norm)
    if not isinstance(classifier, NoiseConditionedClassifier):
        raise RRCMError(f"{path}: a pre-trained network has no classes; use a fine-tuned one")
    classifier.sigma = sigma  # its t is the nearest noise level of the authors' grid
    loaded = _describe(classifier)
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
    if getattr(stem, "strict_img_size", False) and stem.img_size:  # its configuration may be of another size
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
        raise RRCMError(f"{path}: cannot be read as text ({one_line(error)})") from None
    names = [name.strip() for name in names if name.strip()]
    if len(names) != count:
        raise RRCMError(
            f"{path}: has {len(names)} class names, the model {count} classes; give one per line, in the model's order"
        )
    return names


Loader = Callable[[Path, dict], LoadedClassifier]  # (model folder, its config.json) -> classifier
KINDS: dict[str, Loader] = {
    "classifier": _load_classifier_folder,
    "network": _load_network_folder,
    "ensemble": _load_ensemble,
    "denoised": _load_denoised,
}
