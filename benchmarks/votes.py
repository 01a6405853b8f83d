"""How many of a million votes change with the batch size, the number of threads and the precision.

All runs use the same noise, bit for bit. But the network rounds differently, so votes that are nearly tied can change.
The first row runs the images in another order, which must not change any vote.

    python benchmarks/votes.py models/rrcm/sigma_0.5 data/shards
"""

from pathlib import Path

import torch
import typer
from tabulate import tabulate
from torch import nn

from rrcm.utils.app import keep_freed_memory
from rrcm.certification.noise import ESTIMATE
from rrcm.certification.smoothing import SampleRequest, SmoothedClassifier
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.kinds import load_model_folder
from rrcm.utils.provenance import describe_environment


class Recorder(nn.Module):
    """Records the predictions of one of our models."""

    keeps_float32_input = True

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.answers = model, []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = self.model(pixels)
        self.answers.append(logits.argmax(1))
        return logits


def measure(model: Path, shards: Path, votes: int = 1_000_000, images: int = 20) -> None:
    """Compare a classifier's votes with its votes in float32 with batches of 1024 on two threads."""
    keep_freed_memory()
    classifier = load_model_folder(model).classifier
    split = ShardedDataset(shards, "test")
    pixels, _, indices = read_split(split, classifier.encoder.patch_embed.img_size[0], len(split) // images, images)
    each = votes // len(pixels)

    def answers(precision: str, batch_size: int, threads: int, backwards: bool = False) -> torch.Tensor:
        """Predicted classes (images, samples)."""
        torch.set_num_threads(threads)
        recorder = Recorder(classifier)
        smoothed = SmoothedClassifier(
            recorder, classifier.sigma, classifier.num_classes, batch_size=batch_size, precision=precision
        )
        requests = [
            SampleRequest(image.float() / 255, index, ESTIMATE, 0, each)
            for image, index in zip(pixels, indices, strict=True)
        ]
        smoothed.count_votes(requests[::-1] if backwards else requests)
        classes = torch.cat(smoothed.network.answers)[: each * len(pixels)].view(len(pixels), each)
        return classes.flip(0) if backwards else classes

    rows = []
    for precision in ("fp32", "bf16"):
        first = answers(precision, 1024, 2)
        if precision == "fp32":
            exact = first
        for what, (batch_size, threads, backwards) in {
            "images in another order": (1024, 2, True),
            "batch 64": (64, 2, False),
            "batch 1000": (1000, 2, False),
            "one thread": (1024, 1, False),
        }.items():
            changed = int((answers(precision, batch_size, threads, backwards) != first).sum())
            rows.append([f"{precision}, batch 1024, two threads", what, changed])
        if precision == "bf16":
            rows.append(["fp32, batch 1024, two threads", "bf16", int((first != exact).sum())])
    print(f"{model}: changed votes of {first.numel():,}; {describe_environment('cpu')['hardware']['cpu']}\n")
    print(tabulate(rows, ["votes of", "changed to", "changed"], tablefmt="github"))


if __name__ == "__main__":
    typer.run(measure)
