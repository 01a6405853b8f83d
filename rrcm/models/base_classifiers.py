"""TODO docstring."""

from functools import partial

import torch
from torch import nn

from rrcm.models.vit import NoiseConditionedViT, forward_in_chunks


class Classifier(nn.Module):
    """Encoder and linear head at one fixed noise level: noisy pixels in, logits out. This is what gets certified."""

    def __init__(self, encoder: NoiseConditionedViT, num_classes: int, t: float):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        self.t = t

    def forward(self, pixels: torch.Tensor, num_chunks: int = 1) -> torch.Tensor:
        """pixels (B, C, H, W) float32: images in [0, 1] plus Gaussian noise of pixel sigma t / 2 -> logits (B, K)."""
        return self.head(forward_in_chunks(partial(self.encoder, t=self.t), num_chunks, 2 * pixels - 1))


NoiseConditionedClassifier = Classifier
CLASSIFIERS = {"classifier": NoiseConditionedClassifier}
