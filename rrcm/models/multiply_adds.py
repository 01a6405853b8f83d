"""The multiply-adds of a network, which make the passes of different networks comparable."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from rrcm import config
from rrcm.models.architectures import build_network
from rrcm.models.cnn import cnn_multiply_adds
from rrcm.models.stems import stem_multiply_adds
from rrcm.models.vit import encoder_multiply_adds


def network_multiply_adds(model: config.Model, data: config.Data) -> float:
    """Multiply-adds of one image in a forward pass of the network that the settings describe.

    Formulas count our encoders, without a head. For another trunk torch counts, on a network without memory.
    """
    image = data.image_size, data.channels, model.patch_size, model.embed_dim
    if model.architecture == "cnn":
        return cnn_multiply_adds(*image)
    if model.architecture == "vit":
        patches = (data.image_size // model.patch_size) ** 2
        stem = stem_multiply_adds(model.stem, *image)
        return encoder_multiply_adds(stem, patches, model.embed_dim, model.depth, model.num_heads)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_network(model.architecture, data.image_size, data.channels, num_classes=1).eval()
        network(torch.zeros(1, data.channels, data.image_size, data.image_size))
    return counter.get_total_flops() / 2
