"""The encoders that are conditioned on the noise level, by the setting `model.architecture`: `vit` and `cnn`."""

from rrcm import config
from rrcm.models.cnn import NoiseConditionedCNN
from rrcm.models.vit import NoiseConditionedViT

Encoder = NoiseConditionedViT | NoiseConditionedCNN


def build_encoder(model: config.Model, data: config.Data) -> Encoder:
    """The encoder that the settings describe, with random weights from torch's global generator."""
    if model.architecture == "cnn":
        return NoiseConditionedCNN(data.image_size, data.channels, model.patch_size, model.embed_dim)
    sizes = data.image_size, data.channels, model.patch_size, model.embed_dim, model.depth, model.num_heads
    encoder = NoiseConditionedViT(*sizes, stem=model.stem)
    if model.init == "moco_v3":
        encoder.init_moco_v3()
    set_training_options(encoder, model)
    return encoder


def set_training_options(encoder: Encoder, model: config.Model) -> None:
    """Which layers of a ViT stay fixed, and whether its backward pass recomputes the blocks."""
    if isinstance(encoder, NoiseConditionedViT):
        encoder.patch_embed.requires_grad_(not model.freeze_patch_embed)
        encoder.grad_checkpointing = model.grad_checkpointing
