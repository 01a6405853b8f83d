"""Learning rates, decay rates and moving averages of the two trainings, as pure functions of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from rrcm.models.cnn import NoiseConditionedCNN


def teacher_decay(
    step: int, total_steps: int, *, start: float = 0.99, end: float = 0.9999, steepness: float = 10.0
) -> float:
    """Decay rate mu(k) of the teacher (Lei et al. 2025, section 3).

    e(k) = sqrt(k / K * (m1^2 - m0^2) + m0^2), c = 2 / (1 + exp(-A (e - m0) / (m1 - m0))) - 1, mu = c m1 + (1 - c) m0

    >>> [round(rrcm.teacher_decay(step, 1000), 4) for step in (0, 100, 1000)]
    [0.99, 0.9946, 0.9999]
    """
    reached = end if step >= total_steps else math.sqrt(step / total_steps * (end**2 - start**2) + start**2)
    share = 2 / (1 + math.exp(-steepness * (reached - start) / (end - start))) - 1
    return share * end + (1 - share) * start


@torch.no_grad()
def update_average(average: nn.Module, source: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * source, for parameters only. Buffers are left alone.

    `average` may cover only a part of `source`. Parameters are matched by name.
    """
    new = dict(source.named_parameters())
    torch._foreach_lerp_(list(average.parameters()), [new[name] for name, _ in average.named_parameters()], 1 - decay)


def warmup_cosine(progress: float, warmup: float, total: float) -> float:
    """Learning-rate factor in [0, 1]: linear from 0 at progress 0 to 1 at `warmup`, then half a cosine to 0 at `total`.

    All three arguments have the same unit: steps in pre-training, epochs in fine-tuning.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (total - warmup)))


def warmup_step(progress: float, warmup: float, every: float) -> float:
    """Learning-rate factor in [0, 1]: linear from 0 at progress 0 to 1 at `warmup`, divided by ten after each `every`.

    All three arguments have the same unit. `every` counts from progress 0.
    """
    return min(1.0, progress / warmup if warmup else 1.0) * 0.1 ** (progress // every)


def build_optimizer(
    parameters: Iterable[tuple[float, list[nn.Parameter]]],
    *,
    lr: float,
    weight_decay: float,
    name: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW, or `sgd` with momentum 0.9. `parameters` are groups (lr_scale, parameters).

    `Trainer.optimizer_step` multiplies the learning rate of each group by its `lr_scale`.
    """
    groups = [{"params": group, "lr_scale": scale} for scale, group in parameters]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True)


def layerwise_groups(classifier: nn.Module, decay: float) -> list[tuple[float, list[nn.Parameter]]]:
    """The trainable parameters with their learning-rate factors, grouped as `build_optimizer` takes them."""
    scales = layerwise_lr_scales(classifier, decay)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        if name in scales:
            groups.setdefault(scales[name], []).append(parameter)
    return [*groups.items()]


def layerwise_lr_scales(classifier: nn.Module, decay: float) -> dict[str, float]:
    """Learning-rate factor of each trainable parameter (Bao et al. 2022): decay^(depth + 1 - layer).

    Class token, position embedding and patch embedding are layer 0, block i is layer i + 1, and everything else is the
    last layer. In a CNN, convolution i is layer i, and the linear layer is the next one. With decay 1 the classifier
    may be any network.
    """
    if decay == 1:
        return {name: 1.0 for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    if isinstance(classifier.encoder, NoiseConditionedCNN):
        layers, first = "encoder.convolutions.", 0
        last = len(classifier.encoder.convolutions) + 1
    else:
        layers, first = "encoder.blocks.", 1
        last = len(classifier.encoder.blocks) + 1
    scales = {}
    for name, parameter in classifier.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith(("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed")):
            layer = 0
        elif name.startswith(layers):
            layer = int(name.split(".")[2]) + first
        elif name.startswith("encoder.linear."):
            layer = last - 1
        else:
            layer = last
        scales[name] = decay ** (last - layer)
    return scales
