"""Fingerprints of the code that each stage runs for each item, written to files that DVC compares.

A stage depends on its own file. So it runs again when the behaviour of its code changes, and at no other time. The
settings and the method table are watched by value instead (derived.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rrcm.config import Config
from rrcm.derived import CONDITIONED
from rrcm.methods import MATCHED_PRETRAINING, METHODS, PASS_OBJECTIVE, REFERENCE
from rrcm.models import ENCODERS, FOLDER_LOADERS, NETWORKS
from rrcm.objectives import FINETUNING, PRETRAINING
from rrcm.sources import DATASETS
from rrcm.utils.code import fingerprints, read_module
from rrcm.utils.files import atomic_directory, expand_user, write_text
from rrcm.utils.registry import Registry

STAGES = Path(__file__).parents[1] / "stages"
TABLES = {"rrcm.config", "rrcm.constraints", "rrcm.derived", "rrcm.methods", "rrcm.sections"}  # watched by value
# Modules that can stop a stage but cannot change its result.
NO_RESULTS = {
    "rrcm.data.verification",
    "rrcm.utils.app",
    "rrcm.utils.c_library",
    "rrcm.utils.code",
    "rrcm.utils.describe",
    "rrcm.utils.errors",
    "rrcm.utils.files",
    "rrcm.utils.progress",
    "rrcm.utils.provenance",
    "rrcm.utils.quiet",
    "rrcm.utils.registry",
    "rrcm.utils.resume",
    "rrcm.utils.tensors",
}

Entry = tuple[Registry, str]  # a registry, and the name of one of its entries


class Item(NamedTuple):
    """The code that a stage runs for one of its items."""

    script: str  # its command in stages/
    module: str
    entries: Sequence[Entry] = ()
    also: Sequence[str] = ()  # further modules that the script calls


def write_fingerprints(config: Config, output: Path) -> None:
    """Write one file for each item of each stage, such as OUTPUT/finetune/rrcm.txt."""
    with atomic_directory(output) as folder:
        for name, item in find_items(config).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_text(folder / f"{name}.txt", fingerprint_text(item, watched_tables=name == "plot"))


def fingerprint_text(item: Item, watched_tables: bool = False) -> str:
    """One line each for the script, for the item's entries, and for all modules that they and its module import.

    The modules of settings and methods are included only with `watched_tables`.
    """
    unwatched = NO_RESULTS if watched_tables else NO_RESULTS | TABLES
    lines = {f"stages/{item.script}.py": read_module(item.script, STAGES / f"{item.script}.py").fingerprint}
    lines |= {f"entry {name}": str(registry.data[name]) for registry, name in item.entries}
    modules = [item.module, *item.also, *(registry.module(name) for registry, name in item.entries)]
    lines |= fingerprints(*modules, without=unwatched)
    return "".join(f"{key}  {value}\n" for key, value in lines.items())


def find_items(config: Config) -> dict[str, Item]:
    """The items of all stages, by the names of their files."""
    certified = [entry for method in config.methods for entry in classifier_entries(config, method)]
    tables = [] if config.plugin is None else [config.plugin]  # its methods' labels and colours
    items = {
        "shard-data": Item("shard_data", "rrcm.data.sharding", [(DATASETS, config.data.source)]),
        "denoiser": Item("denoiser", "rrcm.training.denoiser"),
        "latency": Item("latency", "rrcm.evaluation.latency", certified),
        "clean_accuracy": Item("clean_accuracy", "rrcm.evaluation.clean", certified),
        "plot": Item("plot", "rrcm.report.build", also=tables),
    }
    for name in config.pretrain.objectives:
        matched = [(PRETRAINING, MATCHED_PRETRAINING)] if config.pretrain.equal_passes else []
        items[f"pretrain/{name}"] = Item("pretrain", "rrcm.training.pretrain", [(PRETRAINING, name), *matched])
    for method in dict.fromkeys(each["method"] for each in config.derived["finetune"].values()):
        row = METHODS[method]
        module = "ensemble" if row.is_ensemble else "denoised" if row.denoises else "finetune"
        entries, plan = training_entries(config, method), ["rrcm.training.plan"]
        items[f"finetune/{method}"] = Item("finetune", f"rrcm.training.{module}", entries, also=plan)
    for voter in config.derived["soft_labels"].values():
        entries = classifier_entries(config, voter["method"])
        items["soft-labels"] = Item("soft_labels", "rrcm.certification.soft_labels", entries)
    for method in config.derived["training_votes"]:
        entries = classifier_entries(config, method)
        items[f"training-votes/{method}"] = Item("training_votes", "rrcm.certification.training_votes", entries)
    for method in config.methods:
        entries = classifier_entries(config, method)
        items[f"certify/{method}"] = Item("certify", "rrcm.certification.certify", entries)
        items[f"certify_cascade/{method}"] = Item("certify_cascade", "rrcm.certification.certify_cascade", entries)
        items[f"attack/{method}"] = Item("attack", "rrcm.evaluation.attack", entries)
    return items


def classifier_entries(config: Config, method: str) -> list[Entry]:
    """The registry entries that load the classifiers of a method."""
    row = METHODS[method]
    whole = ["ensemble"] if row.is_ensemble else ["denoised"] if row.denoises else []
    return [(FOLDER_LOADERS, kind) for kind in whole] + trunk_entries(config, method)


def trunk_entries(config: Config, method: str) -> list[Entry]:
    """The registry entries that load a single classifier of a method and build its network."""
    name = config.model_of(method).architecture
    if name in CONDITIONED:
        return [(FOLDER_LOADERS, METHODS[method].trained)]
    return [(FOLDER_LOADERS, "network"), (NETWORKS, name if name in NETWORKS else "timm")]


def training_entries(config: Config, method: str) -> list[Entry]:
    """The registry entries behind a training: its objective, its initial weights, and whatever decides its length.

    The entries of a student include all entries of its teacher.
    """
    row, settings = METHODS[method], config.finetune
    objectives = [row.objective] if row.objective is not None else []
    objectives += [PASS_OBJECTIVE] if row.can_pass else []
    entries = classifier_entries(config, method) if row.is_ensemble or row.denoises else trunk_entries(config, method)
    if row.pretrained_here or row.initial_weights == "timm":
        given = settings.initial_weights
        is_file = given is not None and expand_user(given).is_file()
        timm = "timm" if config.model.architecture == "vit" else "timm network"
        entries.append((ENCODERS, timm if row.initial_weights == "timm" else "file" if is_file else "folder"))
    if row.matched:
        entries.append((PRETRAINING, MATCHED_PRETRAINING))
    if row.matched or (settings.equal_passes and objectives):
        objectives.append(METHODS[REFERENCE].objective)
    if row.needs_soft_labels:
        objectives.append(METHODS[config.soft_labels.method].objective)
    if row.is_student:
        entries += training_entries(config, config.student.teacher)
    return entries + [(FINETUNING, name) for name in dict.fromkeys(objectives)]
