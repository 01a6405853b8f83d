"""The trunks that are not ours: networks of images without a noise level, by name."""

from collections.abc import Mapping

from torch import nn

from rrcm.models.base_classifiers import NetworkClassifier
from rrcm.models.convnets import LeNet, ResNet
from rrcm.models.timm_models import suggest_timm_name
from rrcm.utils.distributed import sync_batch_norm
from rrcm.utils.errors import RRCMError, one_line


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


def network_classifier(architecture: Mapping, num_classes: int, sigma: float) -> NetworkClassifier:
    """The classifier that `architecture` describes: the arguments of `build_network`, `pixel_mean` and `pixel_std`.

    Raises `RRCMError` as `build_network` does.
    """
    sizes = {key: architecture[key] for key in ("name", "image_size", "channels")}
    network = sync_batch_norm(build_network(**sizes, num_classes=num_classes))
    return NetworkClassifier(network, num_classes, architecture, sigma)
