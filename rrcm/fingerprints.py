"""The code that each stage runs for each item, as files of fingerprints that DVC compares.

A stage depends on its own file, so that it runs again when its code does something else, and at no other time. What the
settings and the method table say is watched by value (derived.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rrcm.config import Config
from rrcm.data.datasets import DATASETS
from rrcm.methods import MATCHED_PRETRAINING, METHODS, REFERENCE
from rrcm.models import ENCODERS, FOLDER_LOADERS, NETWORKS
from rrcm.objectives import FINETUNING, PRETRAINING
from rrcm.utils.code import fingerprints, read_module
from rrcm.utils.files import atomic_directory, expand_user, write_text
from rrcm.utils.registry import Registry

STAGES = Path(__file__).parents[1] / "stages"
TABLES = {"rrcm.config", "rrcm.constraints", "rrcm.derived", "rrcm.methods", "rrcm.sections"}  # watched by value
# Modules that can stop a stage but not change what it computes.
NO_RESULTS = {
    "rrcm.data.verification",
    "rrcm.utils.app",
    "rrcm.utils.code",
    "rrcm.utils.describe",
    "rrcm.utils.errors",
    "rrcm.utils.files",
    "rrcm.utils.progress",
    "rrcm.utils.provenance",
    "rrcm.utils.registry",
    "rrcm.utils.resume",
    "rrcm.utils.tensors",
}

Entry = tuple[Registry, str]  # what an item names, and in which registry


class Item(NamedTuple):
    """What a stage runs for one of its items."""

    script: str  # its command in stages/
    module: str
    entries: Sequence[Entry] = ()


def write_fingerprints(config: Config, output: Path) -> None:
    """Write a file for each stage and each of its items, such as OUTPUT/finetune/rrcm.txt."""
    with atomic_directory(output) as folder:
        for name, item in find_items(config).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_text(folder / f"{name}.txt", fingerprint_text(item, watched_tables=name == "plot"))


def fingerprint_text(item: Item, watched_tables: bool = False) -> str:
    """A line for the script, for each entry that the item names, and for each module that these and its module import.

    With `watched_tables` also for the modules of settings and methods.
    """
    unwatched = NO_RESULTS if watched_tables else NO_RESULTS | TABLES
    lines = {f"stages/{item.script}.py": read_module(item.script, STAGES / f"{item.script}.py").fingerprint}
    lines |= {f"entry {name}": str(registry.data[name]) for registry, name in item.entries}
    modules = [item.module, *(registry.module(name) for registry, name in item.entries)]
    lines |= fingerprints(*modules, without=unwatched)
    return "".join(f"{key}  {value}\n" for key, value in lines.items())


def find_items(config: Config) -> dict[str, Item]:
    """The items of all stages, by the names of their files."""
    certified = [entry for method in config.methods for entry in classifier_entries(config, method)]
    items = {
        "shard-data": Item("shard_data", "rrcm.data.sharding", [(DATASETS, config.data.source)]),
        "denoiser": Item("denoiser", "rrcm.training.denoiser"),
        "latency": Item("latency", "rrcm.evaluation.latency", certified),
        "plot": Item("plot", "rrcm.report.build"),
    }
    for name in config.pretrain.objectives:
        matched = [(PRETRAINING, MATCHED_PRETRAINING)] if config.pretrain.equal_passes else []
        items[f"pretrain/{name}"] = Item("pretrain", "rrcm.training.pretrain", [(PRETRAINING, name), *matched])
    for method in dict.fromkeys(each["method"] for each in config.derived["finetune"].values()):
        row = METHODS[method]
        module = "ensemble" if row.is_ensemble else "denoised" if row.denoises else "finetune"
        items[f"finetune/{method}"] = Item("finetune", f"rrcm.training.{module}", training_entries(config, method))
    for voter in config.derived["soft_labels"].values():
        entries = classifier_entries(config, voter["method"])
        items["soft-labels"] = Item("soft_labels", "rrcm.certification.soft_labels", entries)
    for method in config.methods:
        entries = classifier_entries(config, method)
        items[f"certify/{method}"] = Item("certify", "rrcm.certification.certify", entries)
        items[f"attack/{method}"] = Item("attack", "rrcm.evaluation.attack", entries)
    for name in config.generate.objectives:
        items[f"conditional-denoiser/{name}"] = Item("denoiser", "rrcm.training.denoiser")
        items[f"generate/{name}"] = Item("generate", "rrcm.evaluation.generation")
    return items


def classifier_entries(config: Config, method: str) -> list[Entry]:
    """What loads the classifiers of a method."""
    row = METHODS[method]
    whole = ["ensemble"] if row.is_ensemble else ["denoised"] if row.denoises else []
    return [(FOLDER_LOADERS, kind) for kind in whole] + trunk_entries(config, method)


def trunk_entries(config: Config, method: str) -> list[Entry]:
    """What loads one classifier that is trained for a method, and builds its network."""
    name = config.model.architecture
    if name == "vit":
        return [(FOLDER_LOADERS, METHODS[method].trained)]
    return [(FOLDER_LOADERS, "network"), (NETWORKS, name if name in NETWORKS else "timm")]


def training_entries(config: Config, method: str) -> list[Entry]:
    """What a training of a method minimizes, what it starts from, and what says how long it is."""
    row, settings = METHODS[method], config.finetune
    objectives = [row.objective] if row.objective is not None else []
    entries = classifier_entries(config, method) if row.is_ensemble or row.denoises else trunk_entries(config, method)
    if row.pretrained_here or row.initial_weights == "timm":
        given = settings.initial_weights
        is_file = given is not None and expand_user(given).is_file()
        entries.append((ENCODERS, "timm" if row.initial_weights == "timm" else "file" if is_file else "folder"))
    if row.matched:
        entries.append((PRETRAINING, MATCHED_PRETRAINING))
    if row.matched or (settings.equal_passes and objectives):
        objectives.append(METHODS[REFERENCE].objective)
    if row.needs_soft_labels:
        objectives.append(METHODS[config.soft_labels.method].objective)
    return entries + [(FINETUNING, name) for name in dict.fromkeys(objectives)]
