"""Build the report of a run: figures, tables, metrics and report.md, from the outputs of the other stages.

The same inputs give the same bytes on every machine. The report names the git revision, the hardware and the versions
of the stages that made its inputs. The machine that draws it leaves no trace.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rrcm.certification.results import ABSTAIN
from rrcm.config import Config
from rrcm.evaluation.metrics import Certificates, best_sigma_table
from rrcm.methods import METHODS
from rrcm.report import latency_tables, tables
from rrcm.report.accuracy_figures import draw_certified_accuracy, draw_envelope
from rrcm.report.against import ONE, pairs_table, strongest_table, values_table
from rrcm.report.against_figure import draw_against
from rrcm.report.classes import by_class, choose_shown, confusion, deployed_classifiers
from rrcm.report.classes_figure import draw_classes
from rrcm.report.costs import certificate_costs
from rrcm.report.deployment import acceptance, add_metrics, deployment, deployment_differences
from rrcm.report.deployment_figure import draw_deployment
from rrcm.report.figures import save_all
from rrcm.report.fonts import note_on_letters
from rrcm.report.gallery import Thumbnail, draw_gallery, verdict
from rrcm.report.inputs import Inputs, certificates_file, read_inputs
from rrcm.report.latency_figure import draw_latency
from rrcm.report.latex import BIBLIOGRAPHY, bibliography, latex_text
from rrcm.report.page import render_markdown, report_values
from rrcm.report.report_page import Galleries, noisy_cards, read_thumbnails, render_report_page
from rrcm.report.representation_figure import draw_representation
from rrcm.report.threats import threats
from rrcm.report.training_figure import draw_training
from rrcm.report.votes import calibration, probabilities
from rrcm.report.votes_figure import draw_probabilities, draw_reliability
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory, write_json, write_text

FEW_RADII = 3  # at most, in the latency figure and in what is shown by class
LEAST_ACCURACY = 0.1  # such a figure shows radii at which some method has this certified accuracy

GALLERY_IMAGES = 8
OTHER_BOUND = {"binary": "margin", "margin": "binary"}


class Gallery(NamedTuple):
    """Test images with the answers of the first method."""

    clean: list[np.ndarray]  # (H, W, C), in [0, 1]
    noisy: dict[float, list[Thumbnail]]  # by sigma
    classes: list[str]  # the true class of each image


def write_report(config: Config, root: Path, output: Path, metrics: Path | None = None) -> None:
    """Write the folder `output` from the outputs of the other stages under `root`.

    `metrics` is a JSON file for `dvc metrics` and `dvc exp show`. DVC compares runs by its path, so it does not lie in
    `output`, whose name may differ from run to run. If `latency.n` is empty, there is neither a figure nor a table of
    latency. Raises `RRCMError` for a missing input, with the command that makes it, and for certificates that do not
    belong together.
    """
    root = Path(root)
    inputs = read_inputs(config, root)
    gallery = read_gallery(config, root, inputs.certificates)
    drawn = draw_figures(config, inputs, gallery)
    made = make_tables(config, inputs)
    texts = {name: table.text for name, table in made.items()}
    published = tables.published(config.data.source, config.methods)
    if published is not None:
        texts["published"] = published
    with atomic_directory(output) as folder:
        save_all(drawn, folder)
        for name, table in made.items():
            write_text(folder / f"{name}.csv", tables.csv_text(table.numbers))
            write_text(folder / f"{name}.md", tables.markdown_text(table.text))
            write_text(folder / f"{name}.tex", latex_text(table))
        write_text(folder / BIBLIOGRAPHY, bibliography(config.methods))
        for name, frame in _plot_data(inputs).items():
            write_text(folder / f"{name}.csv", tables.csv_text(frame))
        values = report_values(config, root, inputs, texts, list(drawn), gallery.classes)
        markdown, noisy = render_markdown(values), noisy_cards(gallery.clean, gallery.noisy)
        galleries = Galleries(read_thumbnails(config, root, inputs), noisy, METHODS[config.methods[0]].label)
        write_text(folder / "report.md", markdown)
        write_text(folder / "index.html", render_report_page(config, inputs, values, markdown, drawn, galleries))
    if metrics is not None:
        values = tables.metrics(inputs.certificates, inputs.margin, inputs.models, config.report.radii)
        add_metrics(values, inputs.cascades, config.report.radii)
        write_json(metrics, values)
    if note := note_on_letters([*inputs.classes, *(label for label, _ in inputs.external)]):
        print(f"note: {note}", file=sys.stderr)


def draw_figures(config: Config, inputs: Inputs, gallery: Gallery) -> dict[str, Figure]:
    """Every figure of the report by name."""
    shown = choose_shown(deployed_classifiers(config, inputs))
    drawn = {
        "certified_accuracy": draw_certified_accuracy(inputs.certificates, inputs.external),
        "envelope": draw_envelope(inputs.certificates),
        "probability": draw_probabilities(inputs.certificates),
        "calibration": draw_reliability(inputs.certificates),
        "classes": draw_classes(shown, inputs.classes, few_radii({("", 0.0): shown.frame}, config.report.radii)),
        "gallery": draw_gallery(gallery.clean, gallery.noisy, METHODS[config.methods[0]].label),
    }
    if inputs.cascades:
        drawn["deployment"] = draw_deployment(inputs.cascades, inputs.by_bound(config.certify.bound))
    if (against := inputs.against) is not None:
        step = config.certify.radius_step if config.certify.stopping == "sequential" else None
        drawn["against"] = draw_against(against, against.ours, step)
        if against.cascades:
            deployed = {name: {ONE: frame} for name, frame in against.cascades.items()}
            drawn["against_deployment"] = draw_against(against, deployed, step)
    if not inputs.finetuning.empty:
        drawn["training"] = draw_training(inputs.pretraining, inputs.finetuning)
    if inputs.representations:
        drawn["representation"] = draw_representation(inputs.representations)
    if inputs.latency:
        drawn["latency"] = draw_latency(
            latency_table(config, inputs).numbers,
            inputs.certificates,
            few_radii(inputs.certificates, config.report.radii),
            config.latency.n[0],
            f"{inputs.latency['device']}, {inputs.latency['dtype']}",
            latency_tables.published_latencies(),
        )
    return drawn


def few_radii(certificates: Certificates, radii: Sequence[float]) -> list[float]:
    """At most FEW_RADII of the `radii`, evenly spaced among those with at least LEAST_ACCURACY."""
    best = best_sigma_table(certificates, radii).groupby("radius")["certified_accuracy"].max()
    often = [radius for radius in radii if best[radius] >= LEAST_ACCURACY] or list(radii[:1])
    chosen = np.linspace(0, len(often) - 1, min(FEW_RADII, len(often))).round().astype(int)
    return [often[i] for i in chosen]


def latency_table(config: Config, inputs: Inputs) -> tables.Table:
    """The table of latencies. `inputs` must have a record of them."""
    return latency_tables.latency(inputs.latency, config.latency.n, config.certify.n0, inputs.budgets)


def make_tables(config: Config, inputs: Inputs) -> dict[str, tables.Table]:
    """Every table with results of this profile, by name."""
    made = {
        "best_sigma": tables.best_sigma(inputs.certificates, config.report.radii),
        "margin": tables.margin(inputs.certificates, inputs.margin, config.report.radii),
        "per_sigma": tables.per_sigma(inputs.certificates, inputs.external, config.report.radii, inputs.clean),
        "budgets": tables.budgets(inputs.budgets),
        "probability": probabilities(inputs.certificates),
        "calibration": calibration(inputs.certificates),
    } | tables_by_the_bound(config, inputs)
    if len(config.methods) > 1:
        made["differences"] = tables.differences(inputs.certificates, config.report.radii, config.seed)
    if pairs := tables.joint_pairs(config.methods):
        made["joint"] = tables.joint(inputs.certificates, pairs, config.report.radii, config.seed)
    if inputs.cascades:
        made |= deployment_tables(config, inputs)
    if (against := inputs.against) is not None:
        made["against_values"] = values_table(against, config.report.radii)
        made["against_strongest"] = strongest_table(against, config.report.radii, config.seed)
        made["against_pairs"] = pairs_table(against, config.report.radii, config.seed)
    if inputs.latency and inputs.latency.get("cascades"):
        made["cascade_latency"] = latency_tables.cascade_latency(inputs.latency, config.latency.n, config.certify.n0)
    return made | ({"latency": latency_table(config, inputs)} if inputs.latency else {})


def tables_by_the_bound(config: Config, inputs: Inputs) -> dict[str, tables.Table]:
    """The tables, by name, that show single sigmas and cascades side by side, all by the bound of `certify`."""
    bound, deployed = config.certify.bound, deployed_classifiers(config, inputs)
    certificates, radii, shown = inputs.by_bound(bound), config.report.radii, choose_shown(deployed)
    return {
        "threats": threats(certificates, inputs.cascades, bound, config.data.image_size, config.data.channels),
        "classes": by_class(deployed, inputs.classes, radii, few_radii({("", 0.0): shown.frame}, radii)),
        "confusion": confusion(deployed, inputs.classes),
        "costs": certificate_costs(certificates, inputs.cascades, inputs.budgets, inputs.latency),
    }


def deployment_tables(config: Config, inputs: Inputs) -> dict[str, tables.Table]:
    """The tables of cascades by name. Cascades are certified by the bound of `certify`; the other has a table too."""
    bound, radii = config.certify.bound, config.report.radii
    certificates, other = inputs.by_bound(bound), OTHER_BOUND[bound]
    return {
        "deployment": deployment(inputs.cascades, certificates, bound, radii),
        "deployment_differences": deployment_differences(inputs.cascades, certificates, radii, config.seed),
        "deployment_other_bound": deployment(inputs.cascades, inputs.by_bound(other), other, radii),
        "acceptance": acceptance(inputs.cascades, certificates),
    }


def read_gallery(config: Config, root: Path, certificates: Certificates) -> Gallery:
    """Test images, clean and noisy, with the answers of the first method, evenly spaced over the certified images.

    Raises `RRCMError` if the certificates are for other images than data/shards has.
    """
    from rrcm.data.augment import centre_crop  # these modules import torch, which takes seconds
    from rrcm.data.shards import ShardedDataset
    from rrcm.utils.rng import numpy_rng

    images = ShardedDataset(root / "data/shards", "test")
    frames = {sigma: certificates[config.methods[0], sigma] for sigma in config.sigmas}
    first = frames[config.sigmas[0]]
    rows = np.linspace(0, len(first) - 1, min(GALLERY_IMAGES, len(first))).round().astype(int)
    gallery = Gallery([], {sigma: [] for sigma in frames}, [])
    for row in rows.tolist():
        idx, label = (int(value) for value in first.loc[row, ["idx", "label"]])
        if idx >= len(images) or images.read(idx)[1] != label:
            path = root / certificates_file(config.methods[0], config.sigmas[0])
            raise RRCMError(f"{path}: image {idx} is not the one in data/shards; run `dvc repro` again")
        pixels = np.asarray(centre_crop(images.read(idx)[0], config.data.image_size), np.float32) / 255
        noise = numpy_rng(config.seed, "sheet", idx).standard_normal(pixels.shape, np.float32)
        gallery.clean.append(pixels)
        gallery.classes.append(images.classes[label])
        for sigma, frame in frames.items():
            predict, radius = frame.loc[row, ["predict", "radius"]]
            name = "" if predict == ABSTAIN else images.classes[int(predict)]
            noisy = (pixels + sigma * noise).clip(0, 1)
            thumbnail = Thumbnail(noisy, images.classes[label], name, radius, verdict(predict, label))
            gallery.noisy[sigma].append(thumbnail)
    return gallery


def _plot_data(inputs: Inputs) -> Mapping[str, pd.DataFrame]:
    """The tables that DVC plots, by name."""
    data = {"curves": tables.accuracy_curves(inputs.certificates)}
    if not inputs.finetuning.empty:
        data["training"] = inputs.finetuning.dropna(subset="val_accuracy")  # DVC would draw a gap as 0
    for name, frames in (("pretraining", inputs.pretraining), ("representation", inputs.representations)):
        if frames:
            data[name] = pd.concat([frame.assign(objective=objective) for objective, frame in frames.items()])
    return data
