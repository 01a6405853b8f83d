"""Classifiers in model folders, of every kind.

A model folder is the contract between training and certification. Its config.json has a `kind`, and FOLDER_LOADERS
has a loader for each kind. A plug-in adds kinds (rrcm/plugins.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rrcm.models import FOLDER_LOADERS
from rrcm.models.base_classifiers import BaseClassifier, WithoutPass
from rrcm.models.folders import check_kind, read_model_config
from rrcm.models.joint import config_at, read_joint
from rrcm.utils.errors import RRCMError


class LoadedClassifier(NamedTuple):
    """A base classifier and the facts needed to certify images with it."""

    classifier: BaseClassifier  # in eval mode
    image_size: int  # side of its square input, pixels
    channels: int  # 1 or 3
    class_names: list[str]
    synsets: list[str] = []  # noqa: RUF012 (never changed); short unique names, as of ImageNet's folders

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def sigma(self) -> float | None:
        """The pixel noise that the classifier was trained for, or None if unknown."""
        return getattr(self.classifier, "sigma", None)


def load_model_folder(
    folder: Path | str,
    sha256: str | None = None,
    *,
    sigma: float | None = None,
    outside_range: bool = False,
    keep_pass: bool = False,
) -> LoadedClassifier:
    """Load the classifier in a model folder of any kind in FOLDER_LOADERS.

    `sha256` is the hash that a larger model records for its part. The classifier of a joint training is loaded for
    pixel noise `sigma`, which other model folders ignore. A classifier that can pass has one more output than there are
    classes, "pass", which is left out unless `keep_pass` is true. Raises `RRCMError` for a folder that is missing
    or damaged, has another hash, or is of an unknown kind, for a joint model without `sigma`, and for a `sigma` that
    its training did not cover, unless `outside_range` is true.
    """
    folder = Path(folder)
    config = read_model_config(folder, sha256)
    check_kind(folder, config, FOLDER_LOADERS)
    config = config_at(folder, config, sigma, outside_range)
    try:
        loaded = FOLDER_LOADERS[config["kind"]](folder, config)
    except RecursionError:
        raise RRCMError(f"{folder}: has parts within parts, too many for any model; train it again") from None
    if config.get("can_pass") and not keep_pass:
        return loaded._replace(classifier=WithoutPass(loaded.classifier).eval())
    return loaded


def load_scales(
    folders: Sequence[Path | str], sigmas: Sequence[float], *, outside_range: bool = False
) -> tuple[list[LoadedClassifier], bool]:
    """The base classifiers of a cascade at increasing `sigmas`, and whether all but the first have the output "pass".

    `folders` has one model for each sigma, or only one for all of them. The weights of a joint model are in memory
    once. Raises `RRCMError` as `load_model_folder` does.
    """
    if len(folders) > 1:
        pairs = zip(folders, sigmas, strict=True)
        return [load_model_folder(each, sigma=sigma, outside_range=outside_range) for each, sigma in pairs], False
    folder = Path(folders[0])
    config = read_model_config(folder)
    can_pass, joint = bool(config.get("can_pass")), read_joint(folder, config) is not None
    scales = [load_model_folder(folder, sigma=sigmas[0], outside_range=outside_range, keep_pass=True)]
    for sigma in sigmas[1:]:
        config_at(folder, config, sigma, outside_range)  # whether the training covered it
        scales.append(scales[0]._replace(classifier=scales[0].classifier.at(sigma)) if joint else scales[0])
    if can_pass:
        scales[0] = scales[0]._replace(classifier=WithoutPass(scales[0].classifier).eval())
    return scales, can_pass


def refuse_within(folder: Path, part: BaseClassifier, kind: type[BaseClassifier]) -> None:
    """Raise `RRCMError` if `part`, of the model in `folder`, is or contains a classifier of the same `kind`."""
    if any(isinstance(module, kind) for module in part.modules()):
        raise RRCMError(f"{folder}: a part of it is itself a {kind.__name__}; name the parts of that one, or another")
