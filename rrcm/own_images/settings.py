"""The settings of `rrcm train`: profile imagefolder, with the choice of the rules. They form a whole params.yaml."""

import contextlib
from importlib.resources import files
from pathlib import Path

import yaml

from rrcm.config import Config, parse_config, read_settings
from rrcm.derived import SECTIONS, derived_settings
from rrcm.methods import METHODS
from rrcm.own_images.facts import Folder
from rrcm.own_images.rules import Choice, Network, Trunk
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import write_text

DEFAULTS = "settings.yaml"  # beside this module: profile imagefolder, written by stages/settings.py
SCRATCH, STARTED = "consistency_joint", "timm_joint"  # methods: from random weights, and from those of timm
WARMUP = 0.1  # share of the epochs, as in the profile
CHECKPOINTS = 20  # of a training


def with_root(root: Path) -> dict:
    """The settings of profile imagefolder for the images at `root`."""
    values = yaml.safe_load((files("rrcm.own_images") / DEFAULTS).read_text(encoding="utf-8"))
    return values | {"data": values["data"] | {"root": str(root)}}


def with_network(values: dict, folder: Folder, trunk: Trunk | Network, start: tuple[str, str | None] | None) -> dict:
    """The settings `values` with a network for the images of `folder`.

    `start` names the model of timm that training starts from, and the file of its weights if it is not to be
    downloaded.
    """
    method, (model, weights) = STARTED if start else SCRATCH, start or (None, None)
    finetune, channels = {"timm": {"model": model, "weights": weights}}, folder.channels
    if isinstance(trunk, Trunk):
        network = {name: getattr(trunk, name) for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    else:
        network = {"architecture": trunk.architecture, "pixel_mean": list(trunk.pixel_mean)}
        network["pixel_std"], channels = list(trunk.pixel_std), trunk.channels
        finetune["layer_decay"] = 1.0  # only the ViT has rates for each layer
    return values | {
        "methods": [method],
        "data": values["data"] | {"image_size": trunk.image_size, "channels": channels},
        "model": values["model"] | network,
        "pretrain": values["pretrain"] | {"objectives": []},
        "finetune": values["finetune"] | finetune,
        "cascade": values["cascade"] | {"methods": [method], "multi_scale": False},
    }


def with_lengths(values: dict, choice: Choice) -> dict:
    """The settings of `with_network`, completed by the lengths that the rules chose."""
    sigmas = list(choice.sigmas)
    checkpoint_every = max(1, choice.epochs * len(sigmas) // CHECKPOINTS)
    finetune = {
        "epochs": choice.epochs,
        "warmup_epochs": WARMUP * choice.epochs,
        "batch_size": choice.batch_size,
        "lr": choice.lr * 256 / choice.batch_size,  # the setting is for a batch of 256
        "evaluate_every": choice.evaluate_every,
        "checkpoint_every": checkpoint_every,
    }
    certify = {"n": choice.n, "max_images": choice.certified}
    return values | {
        "sigmas": sigmas,
        "data": values["data"] | {"val_fraction": choice.val_fraction, "workers": choice.workers},
        "finetune": values["finetune"] | finetune,
        "certify": values["certify"] | certify,
        "cascade": values["cascade"] | {"choose_n": choice.choose_n},
    }


def complete(values: dict) -> dict:
    """The same settings with their derived settings, so that the pipeline can take them as its params.yaml."""
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # parse_config says what is wrong
        return values | {"derived": derived_settings({name: values[name] for name in SECTIONS})}
    return values


def read_params(path: Path, root: Path) -> Config:
    """The settings in a file that `write_params` wrote and the user may have edited, for the images at `root`.

    Raises `RRCMError` for settings that are wrong, or that `rrcm train` cannot run.
    """
    values = dict(read_settings(path))
    if isinstance(values.get("data"), dict):
        values["data"] = values["data"] | {"root": str(root)}
    config = parse_config(complete(values), str(path))
    if config.data.source != "imagefolder":
        raise RRCMError(f"{path}: data.source = {config.data.source}: must be imagefolder, to train on a folder")
    row = METHODS[config.methods[0]]
    others = row.can_pass or row.is_student or row.needs_soft_labels
    others = others or config.finetune.uses_pretraining(config.methods[0])
    other_way = row.joint is None or row.is_ensemble or row.matched
    if len(config.methods) > 1 or others or other_way or config.cascade.methods != config.methods:
        raise RRCMError(
            f"{path}: methods = {config.methods}, cascade.methods = {config.cascade.methods}: must be one joint method "
            f"that needs no other training, such as {SCRATCH} or {STARTED}; the pipeline runs others"
        )
    return config


def write_params(path: Path, config: Config) -> None:
    """Write settings as a params.yaml for `read_params` and for the pipeline."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
