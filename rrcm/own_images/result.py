"""The output of `rrcm train`: a model folder with certificates of held-out images, a model card and a page."""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from rrcm.certification.ceiling import largest_radius
from rrcm.certification.record import CascadeRecord, read_record, record_path
from rrcm.certification.results import ABSTAIN, read_certificates, read_samples, samples_path
from rrcm.config import Config
from rrcm.data.shards import KEY, ShardedDataset
from rrcm.evaluation.metrics import Interval, certified_share
from rrcm.methods import CASCADE
from rrcm.models.kinds import load_model_folder
from rrcm.own_images.facts import Folder
from rrcm.own_images.settings import write_params
from rrcm.report.certified_page import render_certified_page
from rrcm.report.page import read_template
from rrcm.utils.errors import printable
from rrcm.utils.files import atomic_directory, read_json, write_text

FILES = "files.tsv"  # the file of each certified image


class HeldOut(NamedTuple):
    """The held-out images that were certified."""

    frame: pd.DataFrame  # columns of certificate and samples files, with `file` and `class`
    paths: list[Path]
    record: CascadeRecord


class Work(NamedTuple):
    """The files of a run before they are moved into its output."""

    shards: Path
    model: Path
    certificates: Path
    timing: Path  # of the training


def read_held_out(work: Work, root: Path, folder: Folder) -> HeldOut:
    """The certificates in `work`, with the files of their images below `root`."""
    table = work.certificates / f"{CASCADE}.tsv"
    frame = read_certificates(table).join(read_samples(samples_path(table)).drop(columns="idx"))
    keys = ShardedDataset(work.shards, "test").index[frame["idx"], KEY]
    files = [folder.held_out[key] for key in keys]
    names = ["" if predict == ABSTAIN else folder.classes[predict] for predict in frame["predict"]]
    frame = frame.assign(**{"file": list(map(printable, files)), "class": names})
    return HeldOut(frame, [root / file for file in files], read_record(record_path(table)))


def write_result(work: Work, config: Config, folder: Folder, output: Path) -> HeldOut:
    """Write the folder `output`, and put it into place once it is complete. Returns its certified images."""
    held_out = read_held_out(work, Path(config.data.root), folder)
    loaded = load_model_folder(work.model, sigma=config.cascade_sigmas[0])
    text = record_path(work.certificates / f"{CASCADE}.tsv").read_text(encoding="utf-8")
    page = render_certified_page(held_out, loaded, [output.name], held_out.record.model_dump(), text)
    with atomic_directory(output) as target:
        shutil.copytree(work.model, target, dirs_exist_ok=True)
        shutil.copytree(work.certificates, target / "certificates")
        names = held_out.frame[["idx", "file", "class"]].to_csv(sep="\t", index=False, lineterminator="\n")
        write_text(target / "certificates" / FILES, names)
        write_params(target / "params.yaml", config)
        write_text(target / "index.html", page)
        write_text(target / "README.md", render_card(output.name, config, folder, held_out, facts_of(work, config)))
    return held_out


def render_card(name: str, config: Config, folder: Folder, held_out: HeldOut, facts: Mapping[str, str]) -> str:
    """The model card, a README.md. `facts` are about the training."""
    frame, settings = held_out.frame, config.certify
    values = {
        "name": name,
        "quoted": shlex.quote(printable(name)),
        "classes": list(zip(folder.classes, folder.counts, strict=True)),
        "sigmas": [f"{sigma:g}" for sigma in config.cascade_sigmas],
        "images": len(frame),
        "held_out": len(folder.held_out),
        "largest": frame["label"].value_counts(normalize=True).max(),
        "accuracy": accuracy_by_radius(frame, config.report.radii),
        "ceiling": largest_radius(config.cascade_sigmas[-1], settings.n, settings.alpha),
        **{key: getattr(settings, key) for key in ("n", "alpha", "radius_step")},
    }
    return read_template("model_card.md.jinja").render(**values, facts=facts).rstrip("\n") + "\n"


def accuracy_by_radius(frame: pd.DataFrame, radii: Sequence[float]) -> list[tuple[float, Interval]]:
    """Certified accuracy in percent, at the radii up to the first at which it is 0."""
    rows = [(radius, certified_share(frame, radius).times(100)) for radius in radii]
    return rows[: 1 + sum(share.value > 0 for _, share in rows)]


def facts_of(work: Work, config: Config) -> dict[str, str]:
    """Facts about the training for the model card, by their names."""
    model, timing = read_json(work.model / "config.json"), read_json(work.timing)
    hardware, size = timing["environment"]["hardware"], config.data.image_size
    steps = f"{model['training']['epochs']:g} epochs in {timing['seconds'] / 60:.1f} minutes"
    return {
        "method": f"{config.methods[0]}, from {model['initial_weights']}",
        "network": f"{model['parameters']:,} parameters, for {size} x {size} pixels",
        "training": f"{steps} on {hardware['cpu']} ({hardware['instructions']})",
        "accuracy of single noisy validation images": f"{100 * model['selected']['val_accuracy']:.1f} %",
        "seed": str(config.seed),
        "rrcm": timing["environment"]["software"]["packages"]["rrcm"] or "not installed",
    }
