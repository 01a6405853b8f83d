"""Load a base classifier from a model folder, a checkpoint file of the paper's authors, or as a timm model.

A model folder is the contract between training and certification. Its config.json has a `kind`, and KINDS has a loader
for each kind. Code outside the package adds a kind with `KINDS["my kind"] = my_loader`.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rrcm.models.architectures import NetworkEntries, network_classifier
from rrcm.models.authors import load_authors_checkpoint
from rrcm.models.base_classifiers import BaseClassifier, NoiseConditionedClassifier, Normalized
from rrcm.models.checkpoints import classifier_of
from rrcm.models.denoised import DENOISED, SETTINGS, DenoisedClassifier, DenoisedEntries, PartElsewhere
from rrcm.models.denoiser import load_denoiser
from rrcm.models.ensembles import Ensemble, EnsembleEntries
from rrcm.models.folders import Part, check_kind, load_network, parse_entries, read_model_config
from rrcm.models.timm_models import FOLDER, HUB, class_names, is_snapshot, load_timm, suggest_timm_name
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import expand_user, read_text
from rrcm.utils.tensors import sha256_tensors


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


def load_model_folder(folder: Path | str, sha256: str | None = None) -> LoadedClassifier:
    """Load the classifier in a model folder of any kind in KINDS.

    `sha256` is what the model must have that it is part of. Raises `RRCMError` for a missing or damaged folder, one of
    another hash, and one of an unknown kind.
    """
    folder = Path(folder)
    config = read_model_config(folder, sha256)
    check_kind(folder, config, KINDS)
    try:
        return KINDS[config["kind"]](folder, config)
    except RecursionError:
        raise RRCMError(f"{folder}: has parts within parts, too many for any model; train it again") from None


def class_folders(loaded: LoadedClassifier, *, numbers: bool = True) -> dict[str, int]:
    """Folder names that identify a class: its name where no other class has the same, its synset, or its number.

    Numbers identify classes only if no class has a number as its name, since class 10 may be called 11, and not with
    `numbers` False.
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


def _load_classifier_folder(folder: Path, config: dict) -> LoadedClassifier:
    return _describe(classifier_of(folder, config), config["class_names"])


def _load_network_folder(folder: Path, config: dict) -> LoadedClassifier:
    entries = parse_entries(folder, config, NetworkEntries)
    sizes, num_classes = entries.architecture, len(entries.class_names)
    classifier = load_network(folder, lambda: network_classifier(sizes.model_dump(), num_classes, entries.sigma))
    return LoadedClassifier(classifier, sizes.image_size, sizes.channels, entries.class_names)


def _load_ensemble(folder: Path, config: dict) -> LoadedClassifier:
    members = []
    for part in parse_entries(folder, config, EnsembleEntries).members:
        path = folder / part.path
        members.append(load_model_folder(path, part.sha256))
        _refuse_within(folder, members[-1].classifier, Ensemble)
        for name in ("class_names", "image_size", "channels"):
            found, first = getattr(members[-1], name), getattr(members[0], name)
            if found != first:
                raise RRCMError(f"{path}: has {name} {found}, the first member {first}; members must be alike")
    return members[0]._replace(classifier=Ensemble([member.classifier for member in members]).eval())


def _load_denoised(folder: Path, config: dict) -> LoadedClassifier:
    entries = parse_entries(folder, config, DenoisedEntries)
    settings = parse_entries(folder, entries.settings, SETTINGS[entries.denoised]).model_dump()
    named = entries.parts
    if "model" in named.classifier:
        part = parse_entries(folder, named.classifier, PartElsewhere)
        loaded = load_base_classifier(part.model)
        if sha256_tensors(loaded.classifier.state_dict()) != part.sha256:
            raise RRCMError(f"{part.model}: has other weights than {folder}/config.json names; train it again")
    else:
        part = parse_entries(folder, named.classifier, Part)
        loaded = load_model_folder(folder / part.path, part.sha256)
    _refuse_within(folder, loaded.classifier, DenoisedClassifier)
    denoiser = load_denoiser(folder / named.denoiser.path, named.denoiser.sha256)
    fits = loaded.channels == denoiser.channels and loaded.num_classes == len(entries.class_names)
    if not fits or loaded.classifier.stochastic:  # nobody hands it random numbers
        raise RRCMError(f"{folder}/config.json: its denoiser and its classifier do not fit; train it again")
    build = DENOISED[entries.denoised]
    classifier = build(denoiser, loaded.classifier, sigma=entries.sigma, classifier_size=loaded.image_size, **settings)
    return loaded._replace(
        classifier=classifier.eval(), image_size=denoiser.image_size, class_names=entries.class_names
    )


def _refuse_within(folder: Path, part: BaseClassifier, kind: type[BaseClassifier]) -> None:
    """Raises `RRCMError` if a part of the model in `folder` is or contains a classifier of the same kind."""
    if any(isinstance(module, kind) for module in part.modules()):
        raise RRCMError(f"{folder}: a part of it is itself a {kind.__name__}; name the parts of that one, or another")


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
    if getattr(stem, "img_size", None):  # of its positions; its configuration may be of another size
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
