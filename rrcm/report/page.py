"""Write report.md: this module makes the numbers, and templates/report.md.jinja has the prose."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pandas as pd
import yaml
from markupsafe import Markup

from rrcm.config import Config
from rrcm.evaluation.metrics import (
    Certificates,
    Interval,
    accuracy_difference,
    acr_difference,
    average_certified_radius,
    best_sigma_table,
    on_common_images,
)
from rrcm.methods import METHODS, denoising_classifier, expert_of
from rrcm.report.classes import choose_shown, deployed_classifiers
from rrcm.report.deployment import shortfalls
from rrcm.report.html import new_environment
from rrcm.report.inputs import Inputs
from rrcm.report.latency_tables import published_latencies
from rrcm.report.panels import panel_groups
from rrcm.report.tables import (
    escape_markdown,
    interval_text,
    markdown_text,
    method_labels,
    reference_method,
)
from rrcm.utils.errors import printable
from rrcm.utils.files import read_json, sha256_file

EQUAL_COMPUTE = 0.1  # relative difference that counts as equal: whole epochs and steps differ by some percent
# settings without an effect on anything that the report shows
IGNORED_SETTINGS = dict.fromkeys(["derived", "device", "launcher", "plugin", "plugin_path", "attack"], True)
IGNORED_SETTINGS |= {"data": {"root", "workers"}}


class Leader(NamedTuple):
    """The methods with the highest certified accuracy at some radii."""

    labels: list[str]
    radii: list[str]


class Comparison(NamedTuple):
    """Methods compared on the images that all of them certify."""

    name: str  # the costs that are equal, or "any cost"
    images: int
    leaders: list[Leader]
    table: Markup  # the two best methods at each radius and, by ACR, at each sigma


class ImageCount(NamedTuple):
    """How many images a method has certified, or how many certified images show a class."""

    name: str
    images: int


class Environment(NamedTuple):
    """Where some stages ran."""

    records: list[str]  # files of these stages under timings/
    text: str


def render_markdown(values: Mapping[str, object]) -> str:
    """The text of report.md from its `report_values`.

    The template escapes every value for HTML, and names also for Markdown.
    """
    return read_template("report.md.jinja").render(**values).rstrip("\n") + "\n"


def report_values(
    config: Config,
    root: Path,
    inputs: Inputs,
    tables: Mapping[str, pd.DataFrame],
    figures: Sequence[str],
    gallery_classes: Sequence[str],
) -> dict[str, object]:
    """The values in a report, by the names that its templates use.

    `tables` are the tables as text, and `figures` the names of the figures beside the report. `gallery_classes` are the
    true classes of the images in the gallery.
    """
    return {
        "config": config,
        **_values_of_data(config, inputs),
        **_values_of_methods(config),
        **_values_of_provenance(config, root, inputs),
        "comparisons": _headline(config, inputs),
        "shown": choose_shown(deployed_classifiers(config, inputs)).label,
        "shortfalls": shortfalls(inputs.cascades, inputs.by_bound(config.certify.bound)),
        "against": inputs.against,
        "left_out": method_labels(inputs.against.fewer) if inputs.against else [],
        "latency": inputs.latency,
        "latency_sources": list(dict.fromkeys(published_latencies()["source"])),
        "tables": {name: _markdown_table(table) for name, table in tables.items()},
        "columns": {name: list(table.columns) for name, table in tables.items()},
        "figures": figures,
        "gallery_classes": gallery_classes,
    }


def _values_of_data(config: Config, inputs: Inputs) -> dict[str, object]:
    """The values about the certified images and their classes."""
    labels = max((frame["label"] for frame in inputs.certificates.values()), key=len)
    counts = np.bincount(labels, minlength=len(inputs.classes)).tolist()
    return {
        "images": len(labels),
        "subsets": [
            ImageCount(METHODS[name].label, len(frame))
            for (name, sigma), frame in inputs.certificates.items()
            if sigma == config.sigmas[0] and len(frame) < len(labels)
        ],
        "classes": len(inputs.classes),
        "class_counts": [ImageCount(*each) for each in zip(inputs.classes, counts, strict=True)],
        "data_notes": inputs.data_notes,
    }


def _values_of_methods(config: Config) -> dict[str, object]:
    """The values about the methods of the run, which follow from the settings and the method table."""
    rows = {name: METHODS[name] for name in config.methods}
    return {
        "pretrained_elsewhere": [
            (row.label, config.initial_weights(name))
            for name, row in rows.items()
            if row.initial_weights is not None and not config.finetune.uses_pretraining(name) and not row.denoises
        ],
        "denoising": [
            (row, denoising_classifier(name, config.denoised.model_dump()))
            for name, row in rows.items()
            if row.denoises
        ],
        "students": [row.label for row in rows.values() if row.is_student],
        "teacher": METHODS[config.student.teacher].label,
        "needs_soft_labels": any(row.needs_soft_labels for row in rows.values()),
        "small_multiples": len(panel_groups(config.methods)) > 1,
        "reference": METHODS[reference_method(config.methods)].label,
        "gallery_method": METHODS[config.methods[0]].label,
    }


def _values_of_provenance(config: Config, root: Path, inputs: Inputs) -> dict[str, object]:
    """The values about settings, files and environments."""
    records = [path for path in inputs.files if path.startswith("timings/")]
    return {
        "parameters": _yaml(_decisive_settings(config)),
        "hashes": [f"{sha256_file(root / path)}  {printable(path)}" for path in inputs.files],
        "environments": _environments(root, records),
        "num_records": len(records),
    }


def _decisive_settings(config: Config) -> dict:
    """The settings with an effect on the report. Sections that no cascade or no student reads have none."""
    unused = {} if config.cascade.methods else {"cascade": True}
    unused |= {} if any(METHODS[name].is_student for name in config.methods) else {"student": True}
    return config.model_dump(mode="json", exclude=IGNORED_SETTINGS | unused)


def read_template(name: str) -> jinja2.Template:
    """A template of a Markdown page. `md` and `code` write a text as Markdown, and `listing` joins texts by commas."""
    environment = new_environment(keep_trailing_newline=True)
    environment.filters |= {"md": _markdown, "code": _code, "listing": _listing}
    return environment.get_template(name)


def _headline(config: Config, inputs: Inputs) -> list[Comparison]:
    """The comparisons of the `compared_methods`."""
    return [_comparison(config, inputs.certificates, *each) for each in compared_methods(config, inputs).items()]


def compared_methods(config: Config, inputs: Inputs) -> dict[str, list[str]]:
    """The methods at equal fine-tuning budget, at equal total compute and at any cost, if they are several.

    A joint network and its own experts are not several methods. Methods that denoise have no budget in common with the
    others, and students have other networks, so they are compared with all of them at any cost. Joint trainings with a
    part of their experts' passes are in neither of the other two, and methods that can pass take more than the equal
    fine-tuning budget.
    """
    passes = inputs.budgets.groupby("method")["total_passes"].sum()
    total = [name for name in config.methods if METHODS[name].matched or config.finetune.uses_pretraining(name)]
    least, most = ((1 + side * EQUAL_COMPUTE) * passes.get(reference_method(total), 0) for side in (-1, 1))
    apart = [name for name in config.methods if METHODS[name].denoises or METHODS[name].is_student]
    groups = {
        "equal fine-tuning budget": [
            name
            for name in config.methods
            if name not in apart
            and METHODS[name].joint in (None, 1.0)
            and not (METHODS[name].matched or METHODS[name].can_pass)
        ],
        "equal total compute": [name for name in total if least <= passes[name] <= most],
        "any cost": config.methods if apart else [],
    }
    return {name: list(group) for name, group in groups.items() if len(set(map(expert_of, group))) > 1}


def _comparison(config: Config, certificates: Certificates, name: str, methods: Sequence[str]) -> Comparison:
    shared = on_common_images({run: frame for run, frame in certificates.items() if run[0] in methods})
    table = _markdown_table(_comparison_table(config, shared, methods))
    return Comparison(name, len(next(iter(shared.values()))), _leaders(shared, config.report.radii), table)


def _leaders(certificates: Certificates, radii: Sequence[float]) -> list[Leader]:
    """The methods with the highest certified accuracy at each radius, with the best sigma of each method.

    Radii at which no method certifies any image are left out.
    """
    leaders: dict[tuple[str, ...], list[str]] = {}
    for radius, rows in best_sigma_table(certificates, radii).groupby("radius"):
        highest = rows["certified_accuracy"].max()
        if highest > 0:
            best = tuple(rows.loc[rows["certified_accuracy"] == highest, "method"])
            leaders.setdefault(best, []).append(f"{radius:g}")
    return [Leader(method_labels(methods), at) for methods, at in leaders.items()]


def _comparison_table(config: Config, certificates: Certificates, methods: Sequence[str]) -> pd.DataFrame:
    """The two best methods at each radius by certified accuracy (%) with the best sigma, and at each sigma by ACR."""
    rows = []
    for radius in config.report.radii:
        best = best_sigma_table(certificates, [radius]).set_index("method")
        accuracy = {name: best.loc[name, "certified_accuracy"] for name in methods}
        first, second = _top_two(accuracy)
        frames = (certificates[name, best.loc[name, "sigma"]] for name in (first, second))
        difference = accuracy_difference(*frames, radius)
        rows.append([f"accuracy (%), r = {radius:g}", *_named(accuracy, first, second, 100, ".1f", difference)])
    for sigma in config.sigmas:
        acr = {name: average_certified_radius(certificates[name, sigma]) for name in methods}
        first, second = _top_two(acr)
        difference = acr_difference(certificates[first, sigma], certificates[second, sigma])
        rows.append([f"ACR, σ = {sigma:g}", *_named(acr, first, second, 1, ".3f", difference)])
    return pd.DataFrame(rows, columns=["", "highest", "second", "difference"])


def _top_two(values: Mapping[str, float]) -> list[str]:
    return sorted(values, key=lambda name: -values[name])[:2]


def _named(
    values: Mapping[str, float], first: str, second: str, unit: float, digits: str, difference: Interval
) -> list[str]:
    """Two methods with their values and their difference, all multiplied by `unit`."""
    named = [f"{METHODS[name].label} {unit * values[name]:{digits}}" for name in (first, second)]
    return [*named, interval_text(difference.times(unit), digits)]


def _environments(root: Path, records: Sequence[str]) -> list[Environment]:
    """The distinct environments, each with the records that name it."""
    by_text: dict[str, list[str]] = {}
    for path in records:
        by_text.setdefault(_yaml(read_json(root / path)["environment"]), []).append(path)
    return [Environment(paths, f"{text}\n{_yaml({'records': paths})}") for text, paths in by_text.items()]


def _yaml(values: Mapping) -> str:
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()
    return "\n".join(printable(line) for line in text.split("\n"))


def _markdown_table(table: pd.DataFrame) -> Markup:
    return Markup(markdown_text(table).strip("\n"))


def _markdown(text: str) -> Markup:
    return Markup(escape_markdown(text))


def _code(text: str) -> Markup:
    """A code span. Its fence has more backticks than any run of them in the text."""
    text, fence = printable(" ".join(str(text).split())), "`"
    while fence in text:
        fence += "`"
    inner = f" {text} " if text.startswith("`") or text.endswith("`") else text
    return Markup(f"{fence}{inner}{fence}")


def _listing(texts: Sequence[str]) -> Markup:
    """Join texts as in "a, b and c"."""
    *first, last = (Markup(text) if isinstance(text, Markup) else Markup.escape(text) for text in texts)
    return Markup(f"{Markup(', ').join(first)} and {last}") if first else last
