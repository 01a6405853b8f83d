"""Accuracy under noise on the validation split, by which the best weights are selected."""

from collections.abc import Callable

import torch
from torch import nn

from rrcm.utils.distributed import DistEnv, all_reduce_sum, autocast
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.rng import normal_per_sample

VALIDATION_NOISES = 4  # noisy copies of each validation image
BATCH_SIZE = 256


class NoisyValidation:
    """Accuracy on images with Gaussian noise of pixel `sigma`, the same noise at every call.

    pixels (N, C, H, W) uint8, labels (N,). The images are shared among the processes. What the classifier sees is
    `denoise` of a noisy image.
    """

    def __init__(
        self,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        sigma: float,
        seed: int,
        precision: str,
        env: DistEnv,
        denoise: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.pixels, self.labels, self.sigma, self.seed = pixels, labels, sigma, seed
        self.precision, self.env, self.denoise = precision, env, denoise or torch.nn.Identity()

    @torch.no_grad()
    def __call__(self, classifier: nn.Module) -> float:
        """The share of correct predictions, over all processes."""
        training, device = classifier.training, self.env.device
        classifier.eval()
        correct = torch.zeros((), dtype=torch.float64, device=device)
        for rows in torch.arange(self.env.rank, len(self.pixels), self.env.world_size).split(BATCH_SIZE):
            clean, target = to_unit_range(self.pixels[rows].to(device)), self.labels[rows].to(device)
            for copy in range(VALIDATION_NOISES):
                noise = normal_per_sample(
                    clean.shape[1:], self.seed, "validation", copy, positions=rows.tolist(), device=device
                )
                with autocast(device, self.precision):
                    noisy = self.denoise(clean + self.sigma * noise)
                    correct += (classifier(noisy).argmax(1) == target).sum()
        classifier.train(training)
        return float(all_reduce_sum(correct)) / (VALIDATION_NOISES * len(self.pixels))
