"""The networks that papers use for small images: LeNet and ResNet-110. They take pixels and no noise level."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LeNet(nn.Module):
    """conv 20 5x5, pool, conv 50 5x5, pool, fc 500, ReLU, fc: the network that papers use for MNIST (Zhai et al. 2020).

    Its parameters have the names of PyTorch's MNIST example, from which the papers took it.
    """

    def __init__(self, image_size: int, channels: int, num_classes: int):
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2  # after two unpadded convolutions and poolings
        if side < 1:
            raise ValueError(f"images of {image_size} pixels are too small for a LeNet, which needs 16")
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * side * side, 500)
        self.fc2 = nn.Linear(500, num_classes)
        self.to(memory_format=torch.channels_last)  # a step takes half the time on a CPU

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        x = images.contiguous(memory_format=torch.channels_last)
        x = max_pool(self.conv1(x)).relu()  # the ReLU commutes with the pooling, and here it is cheaper
        x = max_pool(self.conv2(x)).relu()
        return self.fc2(self.fc1(x.flatten(1)).relu())


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """`F.max_pool2d(x, 2)`. Without gradients, as in certification, the maximum of slices is four times as fast."""
    if x.requires_grad:
        return F.max_pool2d(x, 2)
    x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
    x = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
    return torch.maximum(x[..., ::2], x[..., 1::2])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut, which is a 1x1 convolution where the size changes."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(x)) + shortcut).relu()


class ResNet(nn.Module):
    """The residual network for CIFAR (He et al. 2016, section 4.2): three stages of 16, 32 and 64 channels.

    Papers on randomized smoothing use depth 110. As there, convolutions start from He's normal initialisation.
    """

    def __init__(self, depth: int, channels: int, num_classes: int):
        super().__init__()
        blocks = (depth - 2) // 6  # per stage, of two convolutions each
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.fc = nn.Linear(64, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.out_channels * math.prod(layer.kernel_size)
                nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (ResidualBlock(channels, channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(ResidualBlock(in_channels, channels, stride), *rest)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        x = self.bn1(self.conv1(images)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def resnet110(image_size: int, channels: int, num_classes: int) -> ResNet:
    """The residual network of depth 110. It takes images of any size."""
    return ResNet(110, channels, num_classes)
