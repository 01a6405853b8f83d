"""The batches of a fine-tuning, and the images and targets that its objective sees."""

from collections.abc import Generator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from rrcm.config import FinetuneSettings
from rrcm.data.augment import FinetuneTransform, mixup_pairs
from rrcm.data.labelled import labelled_rows
from rrcm.data.loader import batch_loader
from rrcm.data.shards import ShardedDataset
from rrcm.data.verification import verify_shards
from rrcm.objectives.base import Batch
from rrcm.training.plan import Training
from rrcm.utils.distributed import DistEnv
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.rng import derive_seed


def open_splits(
    shards: Path | str, env: DistEnv, labels_per_class: int | None = None
) -> tuple[ShardedDataset, ShardedDataset]:
    """The training images, either all of them or a number of each class, and the validation images.

    Raises `RRCMError` if a shard is missing or damaged, or a class has too few images.
    """
    images, validation = ShardedDataset(shards, "train"), ShardedDataset(shards, "val")
    verify_shards([images, validation], env)
    if labels_per_class is not None:
        images.labelled = labelled_rows(images, labels_per_class)
    return images, validation


def batch_seed(training: Training) -> int:
    """The seed of the order and the augmentation of the images."""
    return derive_seed(training.seed, "finetune batches")


def train_batches(training: Training, images: ShardedDataset, env: DistEnv, first_step: int) -> Generator[Batch]:
    """This process's share of the augmented images of each step, from `first_step` on."""
    return batch_loader(
        images,
        FinetuneTransform(training.settings.augmentation, training.data.image_size),
        batch_size=training.budget.step_images,
        seed=batch_seed(training),
        steps=range(first_step, training.budget.total_steps),
        env=env,
        workers=training.data.workers,
    )


class Targets:
    """Turns a batch of the loader into the batch of an objective: mixed images, class probabilities, other targets."""

    def __init__(
        self,
        settings: FinetuneSettings,
        num_classes: int,
        seed: int,
        device: torch.device,
        by_image: Mapping[str, torch.Tensor] | None = None,  # further targets by name, a row for each training image
    ):
        self.settings, self.num_classes, self.seed, self.device = settings, num_classes, seed, device
        self.by_image = by_image or {}
        self.mixup_fn = None
        if settings.mixup > 0 or settings.cutmix > 0:
            from timm.data import Mixup  # this import takes seconds

            mixup = partial(Mixup, settings.mixup, settings.cutmix, switch_prob=settings.mixup_switch_prob)
            self.mixup_fn = mixup(label_smoothing=settings.label_smoothing, num_classes=num_classes)
            self.pair_mixup_fn = mixup(label_smoothing=0.0, num_classes=2)

    def __call__(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """`image` (B, C, H, W) float32 in [0, 1] and `target` (B, K) float32 class probabilities.

        The rows of `by_image` are added by their names, float32, such as `soft_label` (B, K). They belong to the images
        before augmentation, and are mixed in the same way as the images.
        """
        settings, seed = self.settings, derive_seed(self.seed, "mixup", step)
        pixels = batch["image"].to(self.device, non_blocking=True)
        labels = batch["label"].to(self.device, non_blocking=True)
        if self.mixup_fn is None:
            images, target = pixels, F.one_hot(labels, self.num_classes).float()
            target = target * (1 - settings.label_smoothing) + settings.label_smoothing / self.num_classes
        else:
            images, target = mixup_pairs(self.mixup_fn, pixels, labels, seed)
        inputs = {"image": to_unit_range(images), "target": target}
        for name, rows in self.by_image.items():
            own = rows[batch["index"]].to(self.device)
            if self.mixup_fn is not None:
                which = torch.arange(len(pixels), device=self.device) % 2  # first or second image of a pair
                _, shares = mixup_pairs(self.pair_mixup_fn, pixels, which, seed)
                own = mix_in_pairs(own, shares)
            inputs[name] = own
        return inputs


def mix_in_pairs(rows: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Mix rows 0 and 1, rows 2 and 3, and so on: rows (B, K), shares (B, 2) of both rows of the pair -> (B, K)."""
    pairs = rows.unflatten(0, (-1, 2)).repeat_interleave(2, 0)
    return torch.einsum("bp,bpk->bk", shares, pairs)
