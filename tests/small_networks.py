"""Small classifiers of 3 x 8 x 8 images with five classes, as bases of smoothed classifiers."""

import torch
import torch.nn.functional as F
from torch import nn

from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.vit import NoiseConditionedViT

SHAPE, CLASSES = (3, 8, 8), 5


class ConvNet(nn.Module):
    """A network with the layers that have a training mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(144, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x)))).flatten(1))


def conv_net(kind: type[ConvNet] = ConvNet, seed: int = 0) -> ConvNet:
    """A `kind` with random weights and statistics, in train mode."""
    torch.manual_seed(seed)
    network = kind()
    nn.init.uniform_(network.norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(network.norm.running_var, 0.5, 2)
    return network


def noise_conditioned() -> NoiseConditionedClassifier:
    """Our classifier for sigma 0.5, with a random head, in train mode."""
    torch.manual_seed(1)
    encoder = NoiseConditionedViT(8, 3, 4, embed_dim=32, depth=2, num_heads=2)
    classifier = NoiseConditionedClassifier(encoder, CLASSES, 1.0)
    nn.init.normal_(classifier.head.weight)
    return classifier
