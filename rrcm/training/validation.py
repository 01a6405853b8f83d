"""TODO docstring."""

import torch

from rrcm.models.base_classifiers import Classifier
from rrcm.utils.distributed import Process, all_sum, autocast
from rrcm.utils.rng import normal_per_sample

VALIDATION_COPIES = 4  # noisy copies of each validation image


@torch.no_grad()
def noisy_accuracy(
    classifier: Classifier,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    sigma: float,
    seed: int,
    precision: str,
    process: Process,
    batch_size: int = 256,
) -> float:
    """Accuracy on images with Gaussian noise of pixel `sigma`, the same noise at every look.

    pixels (N, C, H, W) uint8, labels (N,). The images are shared out over the processes.
    """
    classifier.eval()
    right = torch.zeros((), dtype=torch.float64, device=process.device)
    for rows in torch.arange(process.rank, len(pixels), process.world).split(batch_size):
        clean, target = pixels[rows].to(process.device).float() / 255, labels[rows].to(process.device)
        for copy_index in range(VALIDATION_COPIES):
            noise = normal_per_sample(
                clean.shape[1:], seed, "validation", copy_index, positions=rows.tolist(), device=process.device
            )
            with autocast(process.device, precision):
                right += (classifier(clean + sigma * noise).argmax(1) == target).sum()
    classifier.train()
    return float(all_sum(right)) / (VALIDATION_COPIES * len(pixels))
