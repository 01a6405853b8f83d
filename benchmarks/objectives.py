"""Seconds per fine-tuning step of each objective, relative to Gaussian with one noisy copy, at equal batch size.

A step consists of drawing the noise, the attack if there is one, the loss, the backward pass and AdamW. All objectives
train the same small ViT on the same images, with the settings of params.yaml at one noise level. They alternate in one
process, so that drifting machine speed affects all of them equally. Compare medians over the rounds. "passes" is the
number of passes that budgets count.

    python stages/compose.py profile=cifar10 --output cifar10.yaml
    python benchmarks/objectives.py --params cifar10.yaml --sigma 0.5
"""

import time
from pathlib import Path
from statistics import median

import torch
from tabulate import tabulate

from rrcm.utils.app import keep_freed_memory, make_app, resume_gc
from rrcm.config import load_config
from rrcm.methods import METHODS
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.vit import NoiseConditionedViT
from rrcm.objectives.base import StepRandomness
from rrcm.objectives.gaussian import Gaussian
from rrcm.training.budget import build_finetuning_objective
from rrcm.utils.distributed import autocast, resolve_precision
from rrcm.utils.progress import Progress

resume_gc()
app = make_app()
NUM_CLASSES, SHAPE = 10, (3, 32, 32)


class Training:
    """A classifier that is trained on one objective."""

    def __init__(self, objective, batch: dict, sigma: float, precision: str):
        torch.manual_seed(0)
        encoder = NoiseConditionedViT(SHAPE[-1], SHAPE[0], 4, embed_dim=192, depth=4, num_heads=3)
        self.classifier = NoiseConditionedClassifier(encoder, NUM_CLASSES, 2 * sigma).train()
        self.optimizer = torch.optim.AdamW(self.classifier.parameters(), lr=1e-4, fused=True)
        self.objective, self.batch, self.precision, self.steps = objective, batch, precision, 0

    def classify(self, noisy: torch.Tensor, *, frozen: bool = False) -> torch.Tensor:
        self.classifier.train(not frozen)
        with autocast(noisy.device, self.precision):
            return self.classifier(noisy).float()

    def step(self) -> float:
        """Take one step, as in the last epochs of training when all warm-ups are over; returns its seconds."""
        start, count = time.perf_counter(), len(self.batch["image"])
        random = StepRandomness(0, self.steps, range(count), count, torch.device("cpu"), 1e6)
        loss = self.objective(self.classify, self.batch, random)["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return time.perf_counter() - start


@app.command()
def main(params: Path = Path("params.yaml"), sigma: float = 0.5, batch: int = 32, rounds: int = 5) -> None:
    """Print the seconds per step of each objective, their ratio to Gaussian, and the ratio of passes per image."""
    keep_freed_memory()
    torch.set_num_threads(1)
    config = load_config(params)
    precision = resolve_precision(torch.device("cpu"), "auto")
    target = torch.eye(NUM_CLASSES)[torch.arange(batch) % NUM_CLASSES]
    images = {"image": torch.rand(batch, *SHAPE), "target": target, "soft_label": 0.9 * target + 0.01}
    scratch = {name: row for name, row in METHODS.items() if row.initial_weights is None and not row.matched}
    rows = {row.objective: name for name, row in scratch.items()}
    objectives = {"gaussian, m = 1": Gaussian(sigma, 1)}
    for name, method in rows.items():
        objectives[name] = build_finetuning_objective(config.finetune.settings(method, sigma), method, sigma)
    trainings = {name: Training(objective, images, sigma, precision) for name, objective in objectives.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    with Progress(rounds + 1, "objectives", "rounds") as progress:
        for number in range(rounds + 1):
            for name, training in trainings.items():
                elapsed = training.step()
                if number:  # the first round warms up
                    seconds[name].append(elapsed)
            progress.update(1)
    base, cost = median(seconds["gaussian, m = 1"]), objectives["gaussian, m = 1"].forwards_per_image
    table = [
        [
            name,
            f"{median(times):.3f} ({min(times):.3f} - {max(times):.3f})",
            f"{median(times) / base:.1f}",
            f"{objectives[name].forwards_per_image / cost:.1f}",
        ]
        for name, times in seconds.items()
    ]
    print(tabulate(table, ["objective", "s per step (range)", "ratio", "passes, ratio"], tablefmt="github"))


if __name__ == "__main__":
    app()
