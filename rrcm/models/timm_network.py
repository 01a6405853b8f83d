"""Pre-trained timm networks other than plain ViTs, from which fine-tuning can start: their input and their weights.

timm is imported inside the functions, because importing it takes more than a second and most runs do not need it.
"""

from typing import NamedTuple

from torch import nn

from rrcm.models.timm_models import load_timm
from rrcm.utils.errors import RRCMError
from rrcm.utils.tensors import load_weights

RGB = 3
HEAD_STD = 2e-5  # of the weights of a new head, as in base_classifiers.py


class NetworkInput(NamedTuple):
    """The images that a timm network was trained on."""

    architecture: str  # timm's name of the network, without its weights
    side: int  # of its square images, pixels
    any_side: bool  # whether it also takes images of other sizes
    channels: int
    mean: tuple[float, ...]  # per channel, pixels in [0, 1]
    std: tuple[float, ...]

    def for_channels(self, channels: int) -> tuple[list[float], list[float]]:
        """Mean and deviation for images of `channels` channels. Grey images have the averages of the colours."""
        if channels == self.channels:
            return list(self.mean), list(self.std)
        return [sum(self.mean) / self.channels], [sum(self.std) / self.channels]


def input_of(network: nn.Module, name: str) -> NetworkInput:
    """The input of a network that `load_timm` has loaded. Raises `RRCMError` for images that are not square.

    The message calls the network `name`.
    """
    from timm.data import resolve_model_data_config

    data, config = resolve_model_data_config(network), network.pretrained_cfg
    channels, height, width = data["input_size"]
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)  # of its position embedding
    if size:
        height, width = size
    if height != width or channels not in (1, RGB):
        raise RRCMError(f"{name}: takes images of {channels} x {height} x {width}: must be square, of 1 or 3 channels")
    any_side = not (size or config.get("fixed_input_size", False))
    return NetworkInput(config["architecture"], height, any_side, channels, tuple(data["mean"]), tuple(data["std"]))


def copy_timm_weights(network: nn.Module, name: str, weights: str | None) -> None:
    """Give `network` the weights of the timm model `name`, as `load_timm` finds them, and a new head.

    `network` has the same architecture, for other classes. Its head gets very small random weights from torch's global
    generator, like the head of our ViT: some timm networks initialize a head for few classes with weights so large that
    a short training does not undo them. If `network` takes grey images and the model takes colour images, the weights
    of the first layer are summed over the colours, as if a grey image had three equal channels.

    Raises `RRCMError` as `load_timm` does, and for a model of another architecture, other channels or another size.
    """
    model = load_timm(name, weights)
    config = model.pretrained_cfg
    heads, stems = (_names(config.get(key)) for key in ("classifier", "first_conv"))
    expected, tensors = network.state_dict(), model.state_dict()
    for stem in stems:
        key = f"{stem}.weight"
        given, wanted = tensors.get(key), expected.get(key)
        if given is not None and wanted is not None and given.shape[1] != wanted.shape[1]:
            if given.shape[1] != RGB or wanted.shape[1] != 1:
                raise RRCMError(
                    f"{name}: takes images of {given.shape[1]} channels, and the images have {wanted.shape[1]}; set "
                    f"data.channels = {given.shape[1]}"
                )
            tensors[key] = given.sum(dim=1, keepdim=True)
    own = {key: value for key, value in expected.items() if key.rpartition(".")[0] in heads}
    others = {key: value for key, value in tensors.items() if key.rpartition(".")[0] not in heads}
    load_weights(network, others | own, name)
    for head in heads:
        for parameter in network.get_submodule(head).parameters():
            nn.init.zeros_(parameter) if parameter.ndim == 1 else nn.init.trunc_normal_(parameter, std=HEAD_STD)


def _names(modules: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    return (modules,) if isinstance(modules, str) else tuple(modules or ())
