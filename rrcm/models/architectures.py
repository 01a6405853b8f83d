"""The trunks that are not ours: networks of images without a noise level, by name."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import ConfigDict, model_validator
from torch import nn

from rrcm.config import Positive
from rrcm.models.base_classifiers import NetworkClassifier
from rrcm.models.convnets import LeNet, ResNet
from rrcm.models.folders import ClassNames, Entries, ImageSize
from rrcm.models.timm_models import suggest_timm_name
from rrcm.utils.distributed import sync_batch_norm
from rrcm.utils.errors import RRCMError, one_line


class NetworkSizes(Entries):
    """The arguments of `build_network`, and the normalization of pixels in [0, 1], per channel; null: none."""

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
    """`lenet`, `resnet110`, or the model of timm with this name, with random weights from torch's global generator.

    It maps (B, channels, image_size, image_size) to logits (B, num_classes). Raises `RRCMError` for an unknown name and
    for sizes that the network cannot have.
    """
    try:
        if name == "lenet":
            return LeNet(image_size, channels, num_classes)
        if name == "resnet110":
            return ResNet(110, channels, num_classes)
        import timm  # seconds of import

        if complaint := suggest_timm_name(name):
            raise RRCMError(f"model.architecture = {name!r}: must be vit, lenet, resnet110 or a timm name; {complaint}")
        try:
            return timm.create_model(name, num_classes=num_classes, in_chans=channels, img_size=image_size)
        except TypeError:  # convolutional networks take any size and no such argument
            return timm.create_model(name, num_classes=num_classes, in_chans=channels)
    except RRCMError:
        raise
    except Exception as error:  # each of timm's models raises its own
        raise RRCMError(f"model.architecture = {name!r}: cannot be built ({one_line(error)})") from None


class NetworkEntries(Entries):
    """Of the config.json of a classifier on another trunk, what builds it."""

    model_config = ConfigDict(extra="ignore")

    architecture: NetworkSizes
    class_names: ClassNames
    sigma: Positive  # pixel units


def network_classifier(architecture: Mapping, num_classes: int, sigma: float) -> NetworkClassifier:
    """The classifier that `architecture` describes: the arguments of `build_network`, `pixel_mean` and `pixel_std`.

    Raises `RRCMError` as `build_network` does.
    """
    sizes = {key: architecture[key] for key in ("name", "image_size", "channels")}
    network = sync_batch_norm(build_network(**sizes, num_classes=num_classes))
    return NetworkClassifier(network, num_classes, architecture, sigma)
