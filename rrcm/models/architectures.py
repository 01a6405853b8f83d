"""Networks other than our ViT, by name. They take images and no noise level."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, model_validator
from torch import nn

from rrcm.config import Positive
from rrcm.models import NETWORKS
from rrcm.models.base_classifiers import NetworkClassifier
from rrcm.models.folders import ClassNames, Entries, ImageSize, load_network, parse_entries
from rrcm.models.kinds import LoadedClassifier
from rrcm.utils.distributed import sync_batch_norm
from rrcm.utils.errors import RRCMError, one_line


class NetworkSizes(Entries):
    """The arguments of `build_network`, and how pixels in [0, 1] are normalised per channel (null: not at all)."""

    name: str
    image_size: ImageSize
    channels: Literal[1, 3]
    pixel_mean: list[float] | None
    pixel_std: list[Positive] | None

    @model_validator(mode="after")
    def one_number_per_channel(self) -> Self:
        for key in ("pixel_mean", "pixel_std"):
            if (values := getattr(self, key)) is not None and len(values) != self.channels:
                raise ValueError(f"{key} has {len(values)} numbers for {self.channels} channels")
        return self


def build_network(name: str, image_size: int, channels: int, num_classes: int) -> nn.Module:
    """`lenet`, `resnet110`, or the timm model of this name, with random weights from torch's global generator.

    It maps (B, channels, image_size, image_size) to logits (B, num_classes). Raises `RRCMError` for an unknown name and
    for sizes that the network does not support.
    """
    network = name if name in NETWORKS else "timm"
    named = {"name": name} if network == "timm" else {}
    try:
        return NETWORKS[network](image_size=image_size, channels=channels, num_classes=num_classes, **named)
    except RRCMError:
        raise
    except Exception as error:  # timm's models raise all kinds of exceptions
        raise RRCMError(f"model.architecture = {name!r}: cannot be built ({one_line(error)})") from None


class NetworkEntries(Entries):
    """The entries of config.json that describe a classifier with one of these networks."""

    model_config = ConfigDict(extra="ignore")

    architecture: NetworkSizes
    class_names: ClassNames
    sigma: Positive  # pixel units
    can_pass: bool = False  # it has one more output, "pass"


def network_classifier(architecture: Mapping, num_classes: int, sigma: float) -> NetworkClassifier:
    """The classifier that `architecture` describes: the arguments of `build_network`, `pixel_mean` and `pixel_std`.

    Raises `RRCMError` as `build_network` does.
    """
    sizes = {key: architecture[key] for key in ("name", "image_size", "channels")}
    network = sync_batch_norm(build_network(**sizes, num_classes=num_classes))
    return NetworkClassifier(network, num_classes, architecture, sigma)


def load_network_folder(folder: Path, config: dict) -> LoadedClassifier:
    """The loader of kind "network" in `rrcm.models.FOLDER_LOADERS`."""
    entries = parse_entries(folder, config, NetworkEntries)
    sizes, outputs = entries.architecture, len(entries.class_names) + entries.can_pass
    classifier = load_network(folder, lambda: network_classifier(sizes.model_dump(), outputs, entries.sigma))
    return LoadedClassifier(classifier, sizes.image_size, sizes.channels, entries.class_names)
