"""What `rrcm train` prints."""

import sys
from collections.abc import Mapping

from rrcm.config import Config
from rrcm.evaluation.metrics import certified_share
from rrcm.own_images.result import HeldOut, accuracy_by_radius
from rrcm.own_images.rules import Trunk


def print_row(name: str, text: str) -> None:
    """Print one fact or choice in a line."""
    print(f"{name:12} {text}", flush=True)


def print_note(text: str) -> None:
    """A line of what the user should know."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def print_settings(config: Config) -> None:
    """Print what will be trained and certified."""
    method, sigmas, data, model = config.methods[0], config.sigmas, config.data, config.model
    settings, start = config.finetune.settings(method, sigmas[0]), config.initial_weights(method)
    network = f"{model.architecture} for {data.image_size} x {data.image_size} pixels"
    if model.architecture == "vit":
        trunk = Trunk(data.image_size, model.patch_size, model.embed_dim, model.depth, model.num_heads)
        network = trunk.description
    print_row("network", f"{network}, from {'random weights' if start == 'scratch' else start}")
    print_row("noise", f"sigma {', '.join(f'{sigma:g}' for sigma in sigmas)}")
    print_row("training", f"{method}: {settings.epochs:,} epochs at each sigma, batches of {settings.batch_size}")
    most = "all" if config.certify.max_images is None else f"{config.certify.max_images:,}"
    print_row("certificates", f"{most} held-out images, at most {config.certify.n:,} samples at each sigma")


def print_time(seconds: Mapping[str, float]) -> None:
    """Print how long each part of the work will take."""
    parts = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    print_row("estimate", f"{sum(seconds.values()) / 60:.1f} minutes: {parts}")


def print_result(held_out: HeldOut, config: Config, seconds: float) -> None:
    """Print the certified accuracy and the time that everything took."""
    print(f"\ncertified accuracy on {len(held_out.frame):,} held-out images, with 95 % intervals")
    for radius, share in accuracy_by_radius(held_out.frame, config.report.radii):
        print(f"  r = {radius:<5g} {share.value:5.1f} %  ({share.low:.0f} to {share.high:.0f} %)")
    print(f"took {seconds / 60:.1f} minutes")
    chance = held_out.frame["label"].value_counts(normalize=True).max()
    if certified_share(held_out.frame, 0.0).low <= chance:
        print_note(
            f"this is not clearly better than naming the most frequent class, which is right for {100 * chance:.0f} %; "
            "more hours or more images may help"
        )
