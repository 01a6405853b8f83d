"""TODO docstring."""

import torch

from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.utils.distributed import DistEnv, all_reduce_sum, autocast
from rrcm.utils.rng import normal_per_sample

VALIDATION_COPIES = 4  # noisy copies of each validation image


@torch.no_grad()
def noisy_accuracy(
    classifier: NoiseConditionedClassifier,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    sigma: float,
    seed: int,
    precision: str,
    env: DistEnv,
    batch_size: int = 256,
) -> float:
    """Accuracy on images with Gaussian noise of pixel `sigma`, the same noise at every look.

    pixels (N, C, H, W) uint8, labels (N,). The images are shared out over the processes.
    """
    classifier.eval()
    right = torch.zeros((), dtype=torch.float64, device=env.device)
    for rows in torch.arange(env.rank, len(pixels), env.world_size).split(batch_size):
        clean, target = pixels[rows].to(env.device).float() / 255, labels[rows].to(env.device)
        for copy_index in range(VALIDATION_COPIES):
            noise = normal_per_sample(
                clean.shape[1:], seed, "validation", copy_index, positions=rows.tolist(), device=env.device
            )
            with autocast(env.device, precision):
                right += (classifier(clean + sigma * noise).argmax(1) == target).sum()
    classifier.train()
    return float(all_reduce_sum(right)) / (VALIDATION_COPIES * len(pixels))
