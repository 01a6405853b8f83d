"""What each method of some recipes costs before anything is trained: passes, multiply-adds, core-hours, certificates.

    python stages/compose.py profile=fashion_mnist preset=flagship --output build/ours.yaml
    python stages/compose.py profile=fashion_mnist_lenet --output build/print.yaml \\
        'methods=[gaussian,stability,consistency,macer,smoothadv,smoothmix,cat_rs]'
    python benchmarks/costs.py ours=build/ours.yaml print=build/print.yaml

A row has all networks of a method at all sigmas: one that is joint, or an expert for each. Passes are those of budgets:
a backward pass counts as two, attacks, pre-training and soft labels are included. Core-hours are passes times the
seconds of a pass, a third of a forward and a backward pass of a batch of 256 on one thread, measured alternately in
float32; loading images and the optimizer are not included. A certificate takes n0 + n forward passes, none of which
sequential stopping saves. A student has multiply-adds and certificates of its own; its passes are counted in passes of
its teacher's network. Methods that denoise are left out, as a report has their passes and seconds.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import torch
import typer
from tabulate import tabulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rrcm.utils.app import exit_on_error, make_app
from rrcm.config import Config, Data, Model, load_config
from rrcm.derived import CONDITIONED, training_noise
from rrcm.methods import METHODS
from rrcm.models.architectures import network_classifier
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.encoders import build_encoder
from rrcm.report.compare import parse_files
from rrcm.training.budget import plan_budget, pretraining_compute
from rrcm.training.start import network_settings

BATCH, CLASSES = 256, 10
Key = tuple[str, bool]  # the name of a recipe, and whether it is the network of its students


class Speed(NamedTuple):
    """Seconds of one image, medians on one thread."""

    trained: float  # for each pass of a training: a third of a forward and a backward pass
    certified: float  # for each forward pass without gradients


def build(model: Model, data: Data) -> nn.Module:
    """The classifier that the settings describe, with random weights."""
    if model.architecture in CONDITIONED:
        return NoiseConditionedClassifier(build_encoder(model, data), CLASSES, 1.0)
    return network_classifier(network_settings(model, data), CLASSES, 0.5)


def multiply_adds(network: nn.Module, images: torch.Tensor) -> float:
    """Multiply-adds of one image in a forward pass."""
    with FlopCounterMode(display=False) as counter:
        network(images)
    return counter.get_total_flops() / 2 / len(images)


def measure(networks: Mapping[Key, nn.Module], images: Mapping[Key, torch.Tensor], rounds: int) -> dict[Key, Speed]:
    """The speed of each network, measured alternately."""
    seconds: dict[Key, list[tuple[float, float]]] = {name: [] for name in networks}
    for number in range(rounds + 1):
        for name, network in networks.items():
            network.zero_grad()
            start = time.process_time()
            network(images[name]).square().mean().backward()
            trained = time.process_time()
            with torch.inference_mode():
                network(images[name])
            if number:
                seconds[name].append((trained - start, time.process_time() - trained))
    return {
        name: Speed(median(each[0] for each in values) / 3 / BATCH, median(each[1] for each in values) / BATCH)
        for name, values in seconds.items()
    }


def passes(config: Config, method: str, images: int) -> tuple[int, float, float]:
    """Networks, and millions of passes of their fine-tuning and of what they need before, at all sigmas."""
    noises = list(dict.fromkeys(training_noise(method, sigma) for sigma in config.sigmas))
    with tempfile.TemporaryDirectory() as folder:
        for name in config.pretrain.objectives:
            record = Path(folder, name, "config.json")
            record.parent.mkdir()
            record.write_text(json.dumps({"compute": {"pretrain": pretraining_compute(config, name)}}))
        accounts = [plan_budget(config, method, noise, images, Path(folder)).account for noise in noises]
    finetune = sum(account["finetune"] for account in accounts)
    return len(noises), finetune / 1e6, (sum(sum(account.values()) for account in accounts) - finetune) / 1e6


def main(
    recipes: Annotated[list[str], typer.Argument(help="NAME=params.yaml")],
    images: Annotated[int, typer.Option(help="Training images.")] = 57_600,
    n: Annotated[int, typer.Option(help="Samples of a certificate, besides n0.")] = 100_000,
    rounds: Annotated[int, typer.Option(help="Rounds of the measurement.")] = 9,
) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    configs = {name: load_config(path) for name, path in parse_files(recipes).items()}
    networks, batches = {}, {}
    for name, config in configs.items():
        for method in config.methods:
            key, size = (name, METHODS[method].is_student), config.data.image_size
            if key not in networks:
                networks[key] = build(config.model_of(method), config.data).train()
                batches[key] = torch.rand(BATCH, config.data.channels, size, size)
    speeds, rows = measure(networks, batches, rounds), []
    costs = {key: multiply_adds(network, batches[key]) for key, network in networks.items()}
    for name, config in configs.items():
        for method in config.methods:
            if METHODS[method].denoises:
                continue
            own, unit = (name, METHODS[method].is_student), (name, False)  # the network whose passes are counted
            count, finetune, before = passes(config, method, images)
            total, certificate = finetune + before, (config.certify.n0 + n) * speeds[own].certified
            row = [name, METHODS[method].label, count, finetune, before, costs[own] / 1e6, total * costs[unit] / 1e6]
            rows.append([*row, total * 1e6 * speeds[unit].trained / 3600, certificate])
    head = ["recipe", "method", "networks", "fine-tuning (M passes)", "before (M passes)", "M multiply-adds per pass"]
    head += ["T multiply-adds", "core-hours", f"s per certificate, n = {n:,}"]
    print(
        tabulate(rows, head, tablefmt="github", floatfmt=("", "", "", ",.1f", ",.1f", ",.2f", ",.1f", ",.2f", ",.2f"))
    )


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
