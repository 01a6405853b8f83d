"""The tables of the report, both as numbers for programs and as text for people, and their file formats."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from rrcm.certification.results import sigma_name
from rrcm.evaluation.metrics import (
    Certificates,
    Interval,
    acr_standard_error,
    average_certified_radius,
    best_sigma_table,
    certified_accuracy,
    differences_table,
    leaders,
    mean_samples,
    per_sigma_table,
    wilson_interval,
)
from rrcm.methods import METHODS, REFERENCE, expert_of
from rrcm.utils.errors import printable

MEASURES = {"certified_accuracy": ("r", 100, ".1f"), "acr": ("ACR, σ", 1, ".3f")}  # name, unit, digits
MARKDOWN_ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in r"\`*_{}[]<>|$&~#"})


class Table(NamedTuple):
    """The two forms of a table: unrounded numbers under names for programs, and text under headings for people."""

    numbers: pd.DataFrame
    text: pd.DataFrame
    best: frozenset[tuple[int, str]] = frozenset()  # row and column of cells: the best, or not significantly below it


def method_labels(methods: Sequence[str]) -> list[str]:
    """The label of each method. A name that is not in the table of methods is its own label."""
    return [METHODS[name].label if name in METHODS else name for name in methods]


def reference_method(methods: Sequence[str]) -> str:
    """The method that others are compared with: rRCM, or the first of `methods` if rRCM is not among them."""
    return REFERENCE if REFERENCE in methods else next(iter(methods), REFERENCE)


def interval_text(interval: Interval, digits: str) -> str:
    """An estimate and its interval, such as 0.065 (0.044 to 0.086), or alone if the interval is NaN."""
    if np.isnan(interval.low):
        return f"{interval.value:{digits}}"
    return f"{interval.value:{digits}} ({interval.low:{digits}} to {interval.high:{digits}})"


def best_sigma(certificates: Certificates, radii: Sequence[float]) -> Table:
    """Certified accuracy with the best sigma at each radius, and in the text also the highest ACR of any sigma.

    The numbers are from `best_sigma_table`, with a 95 % Wilson interval `low` to `high`. The text has percentages, each
    followed in parentheses by the same model's certified accuracy at r = 0, and the ACR with its standard error,
    followed by its sigma. If the methods certify different numbers of images, a last column has these numbers.
    """
    numbers = best_sigma_table(certificates, radii)
    numbers["low"], numbers["high"] = wilson_interval(numbers["certified_accuracy"], numbers["images"])
    rows = {}
    for row in numbers.itertuples():
        cell = f"{100 * row.certified_accuracy:.1f} ({100 * row.at_zero:.1f})"
        rows.setdefault(row.method, {})[f"r = {row.radius:g}"] = cell
    for (method, sigma), frame in sorted(certificates.items(), key=lambda run: run[0][1]):
        acr = average_certified_radius(frame)
        if acr > rows[method].get("acr", -1):  # the smaller sigma of equals
            rows[method] |= {"acr": acr, "ACR (σ)": f"{acr_text(frame)} ({sigma:g})"}
    text = pd.DataFrame(rows.values()).drop(columns="acr")
    text.insert(0, "method", method_labels(rows))
    images = numbers.groupby("method", sort=False)["images"].first()
    return Table(numbers, with_images(text, images), _best_by_method(certificates, numbers, "ACR (σ)"))


def _best_by_method(certificates: Certificates, numbers: pd.DataFrame, acr: str) -> frozenset[tuple[int, str]]:
    """The cells of `Table.best` if each row is a method. `best_sigma_table` gave `numbers`, and `acr` is a column."""
    methods, best = list(dict.fromkeys(numbers["method"])), set()
    for radius, rows in numbers.groupby("radius"):
        frames = {row.method: certificates[row.method, row.sigma] for row in rows.itertuples()}
        best |= {(methods.index(name), f"r = {radius:g}") for name in leaders(frames, radius)}
    ascending = sorted(certificates, key=lambda run: run[1])
    frames = {
        name: max((certificates[run] for run in ascending if run[0] == name), key=average_certified_radius)
        for name in methods
    }
    return frozenset(best | {(methods.index(name), acr) for name in leaders(frames)})


def margin(binary: Certificates, certificates: Certificates, radii: Sequence[float]) -> Table:
    """Certified accuracy by the margin bound (`certificates`), and its gain over the binary bound on the same images.

    The numbers are from `best_sigma_table`, with a column for the gain. The text has percentages and the highest ACR of
    any sigma, each with its gain in parentheses. It also has the mean number of samples per image over all sigmas,
    followed in parentheses by the mean number that the binary bound alone would have drawn.
    """
    numbers = best_sigma_table(certificates, radii)
    numbers["low"], numbers["high"] = wilson_interval(numbers["certified_accuracy"], numbers["images"])
    numbers["gain"] = numbers["certified_accuracy"] - best_sigma_table(binary, radii)["certified_accuracy"]
    rows: dict[str, dict] = {}
    for row in numbers.itertuples():
        cell = f"{100 * row.certified_accuracy:.1f} ({100 * row.gain:+.1f})"
        rows.setdefault(row.method, {})[f"r = {row.radius:g}"] = cell
    for method, cells in rows.items():
        runs = [run for run in certificates if run[0] == method]
        acr, before = (max(average_certified_radius(each[run]) for run in runs) for each in (certificates, binary))
        samples, alone = (np.mean([mean_samples(each[run]) for run in runs]) for each in (certificates, binary))
        cells |= {"ACR": f"{acr:.3f} ({acr - before:+.3f})", "samples": f"{samples:,.0f} ({alone:,.0f})"}
    text = pd.DataFrame(rows.values())
    text.insert(0, "method", method_labels(rows))
    return Table(numbers, text, _best_by_method(certificates, numbers, "ACR"))


def with_images(text: pd.DataFrame, images: Sequence[int]) -> pd.DataFrame:
    """`text` with the number of images as the last column, unless it is the same in all rows."""
    return text.assign(images=[f"{count:,}" for count in images]) if len(set(images)) > 1 else text


def acr_text(frame: pd.DataFrame) -> str:
    """The ACR and its standard error, such as 0.401 ± 0.023."""
    error = acr_standard_error(frame)
    return f"{average_certified_radius(frame):.3f}" + ("" if np.isnan(error) else f" ± {error:.3f}")


def per_sigma(
    certificates: Certificates,
    external: Certificates,
    radii: Sequence[float],
    clean: Mapping[tuple[str, float], float],
) -> Table:
    """Images, mean samples, certified accuracy and ACR of each model. Labels in `external` get "(external)" added.

    `clean` has the accuracies of base classifiers without noise and smoothing. If it is empty, they have no column.
    """
    marked = {(f"{label} (external)", sigma): frame for (label, sigma), frame in external.items()}
    frames = {**certificates, **marked}
    numbers = per_sigma_table(frames, radii)
    text = pd.DataFrame({"method": method_labels(numbers["method"])})
    text["σ"] = [f"{sigma:g}" for sigma in numbers["sigma"]]
    if clean:
        numbers["clean_accuracy"] = [clean.get(run, np.nan) for run in frames]
        text["clean"] = ["" if np.isnan(share) else f"{100 * share:.1f}" for share in numbers["clean_accuracy"]]
    for radius in radii:
        text[f"r = {radius:g}"] = [f"{100 * share:.1f}" for share in numbers[f"r_{radius:g}"]]
    text["ACR"] = [acr_text(frame) for frame in frames.values()]
    text["images"] = [f"{count:,}" for count in numbers["images"]]
    text["samples per image"] = ["" if np.isnan(mean) else f"{mean:,.0f}" for mean in numbers["samples"]]
    return Table(numbers, text, _best_at_each_sigma(certificates, radii))


def _best_at_each_sigma(certificates: Certificates, radii: Sequence[float]) -> frozenset[tuple[int, str]]:
    """The cells of `Table.best` if the rows are `certificates`, which compete with rows of the same sigma."""
    runs, best = list(certificates), set()
    columns = {"ACR": None} | {f"r = {radius:g}": radius for radius in radii}
    for sigma in {sigma for _, sigma in runs}:
        frames = {run: frame for run, frame in certificates.items() if run[1] == sigma}
        for name, radius in columns.items():
            best |= {(runs.index(run), name) for run in leaders(frames, radius)}
    return frozenset(best)


def differences(certificates: Certificates, radii: Sequence[float], seed: int) -> Table:
    """Each method minus the reference on the same images: the numbers of `differences_table` with the training seed.

    The text has a row for each method except the reference, with the differences of accuracy in percentage points and
    of ACR. If the methods have different numbers of images in common with the reference, a last column has these
    numbers.
    """
    methods = list(dict.fromkeys(method for method, _ in certificates))
    numbers = differences_table(certificates, reference_method(methods), radii)
    numbers.insert(0, "seed", seed)
    others = numbers.dropna(subset="difference")
    text = differences_text(others, "difference")
    return Table(numbers, with_images(text, others.groupby("method", sort=False)["images"].first()))


def differences_text(numbers: pd.DataFrame, column: str) -> pd.DataFrame:
    """`column` of each measure as text, with its interval `low` to `high`, in one row per method."""
    rows: dict[str, dict] = {}
    for row in numbers.itertuples():
        name, unit, digits = MEASURES[row.measure]
        interval = Interval(getattr(row, column), row.low, row.high).times(unit)
        rows.setdefault(row.method, {})[f"{name} = {row.at:g}"] = interval_text(interval, digits)
    text = pd.DataFrame(rows.values())
    text.insert(0, "method", method_labels(rows))
    return text


def joint_pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Each joint method among `methods` whose experts are among them too, with the experts' method."""
    return [(name, expert_of(name)) for name in methods if METHODS[name].joint and expert_of(name) in methods]


def joint(certificates: Certificates, pairs: Sequence[tuple[str, str]], radii: Sequence[float], seed: int) -> Table:
    """Joint methods minus their experts on the same images, for the (joint, expert) `pairs`.

    The numbers have the columns of `differences`. The text has the ACRs of both and their difference, in one row per
    joint method and sigma.
    """
    parts = []
    for pair in pairs:
        both = {run: frame for run, frame in certificates.items() if run[0] in pair}
        numbers = differences_table(both, pair[1], radii)
        parts.append(numbers[numbers["method"] == pair[0]])
    numbers = pd.concat(parts, ignore_index=True)
    numbers.insert(0, "seed", seed)
    acr = numbers[numbers["measure"] == "acr"]
    return Table(numbers, with_images(joint_text(acr), acr["images"].tolist()))


def joint_text(acr: pd.DataFrame) -> pd.DataFrame:
    """The ACRs of joint methods and of their experts at each sigma, `at`, and their difference, as text."""
    return pd.DataFrame(
        {
            "method": method_labels(acr["method"]),
            "σ": [f"{sigma:g}" for sigma in acr["at"]],
            "ACR, experts": [f"{row.value - row.difference:.3f}" for row in acr.itertuples()],
            "ACR, joint": [f"{value:.3f}" for value in acr["value"]],
            "difference": [
                interval_text(Interval(row.difference, row.low, row.high), "+.3f") for row in acr.itertuples()
            ],
        }
    )


def budgets(numbers: pd.DataFrame) -> Table:
    """Length, compute and time of the training of each model. `numbers` is the field `budgets` of `Inputs`."""
    passes = {"fine-tuning": "finetune", "preparation": "preparation", "total": "total"}
    seconds = {"fine-tuning": "finetune", "preparation": "preparation", "certification": "certify"}
    text = pd.DataFrame(
        {
            "method": method_labels(numbers["method"]),
            "σ": [f"{sigma:g}" for sigma in numbers["sigma"]],
            "epochs": [f"{epochs:.4g}" for epochs in numbers["epochs"]],
        }
        | {f"{name} (M passes)": [f"{n / 1e6:,.3f}" for n in numbers[f"{key}_passes"]] for name, key in passes.items()}
        | {f"{name} (s)": [f"{n:,.1f}" for n in numbers[f"{key}_seconds"]] for name, key in seconds.items()}
    )
    return Table(numbers, with_images(text, numbers["images"]))


def published(dataset: str, methods: Sequence[str]) -> pd.DataFrame | None:
    """The published results on `dataset` as text, or None when published.csv has none.

    Certified accuracies are percentages, as published. The status is "here" if one of `methods` has the same label, so
    that this report has its own result for the method, and otherwise "not run". Latencies, if there are any, are
    relative to the latency of rRCM in the same source.
    """
    rows = read_published()
    rows = rows[rows["dataset"] == dataset]
    if rows.empty:
        return None
    cells = [dict(pair.split(":") for pair in text.split()) for text in rows["certified_accuracy"]]
    radii = sorted({radius for row in cells for radius in row}, key=float)
    here = {METHODS[name].label for name in methods}
    text = rows[["method", "model", "sigma", "n"]].rename(columns={"sigma": "σ"})
    for radius in radii:
        text[f"r = {radius}"] = [row.get(radius, "") for row in cells]
    text["ACR"] = rows["acr"]
    if rows["latency"].any():
        text["latency"] = rows["latency"]
    text["status"] = ["here" if name in here else "not run" for name in rows["method"]]
    text["source"] = rows["source"]
    return text.reset_index(drop=True)


def read_published() -> pd.DataFrame:
    """Every row of published.csv, as text.

    `certified_accuracy` is a list of radius:percentage. A percentage in parentheses is the same model's certified
    accuracy at r = 0. `latency` is the time to certify an image with n samples, relative to rRCM in the same source.
    tests/report/test_tables.py checks every cell.
    """
    with (files("rrcm.report") / "published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype=str, keep_default_na=False)


def percentages(accuracies: str) -> dict[float, str]:
    """The percentages of a cell of published.csv by radius, as published, without the ones in parentheses."""
    pairs = (pair.partition("(")[0].split(":") for pair in accuracies.split())
    return {float(radius): share for radius, share in pairs}


def accuracy_curves(certificates: Certificates) -> pd.DataFrame:
    """Certified accuracy, with its 95 % interval, at 81 radii from 0 to 4 sigma: the same in every experiment."""
    grids = []
    for (method, sigma), frame in certificates.items():
        radii = sigma * np.arange(81) / 20  # 4 sigma is more than 100,000 samples can certify
        accuracy = certified_accuracy(frame, radii)
        low, high = wilson_interval(accuracy, len(frame))
        columns = {"method": method, "sigma": sigma, "radius": radii, "certified_accuracy": accuracy}
        grids.append(pd.DataFrame(columns | {"low": low, "high": high}))
    return pd.concat(grids)


def metrics(certificates: Certificates, margin: Certificates, models: Mapping, radii: Sequence[float]) -> dict:
    """Values for `dvc metrics` and `dvc exp show` as {metric: {method: {sigma: value}}}.

    DVC joins the keys by dots, so no key contains one.
    """
    values: dict[str, dict] = {}
    for (method, sigma), frame in certificates.items():
        of_model = {
            "acr": average_certified_radius(frame),
            "samples": mean_samples(frame),
            "margin_acr": average_certified_radius(margin[method, sigma]),
        }
        if (selected := models[method, sigma]["selected"]["val_accuracy"]) is not None:  # null: it was not trained
            of_model["val_accuracy"] = selected
        for radius, share in zip(radii, certified_accuracy(frame, radii).tolist(), strict=True):
            of_model[f"certified_r_{radius:g}".replace(".", "_")] = share
        for name, value in of_model.items():
            of_method = values.setdefault(name, {}).setdefault(method, {})
            of_method[sigma_name(sigma).replace(".", "_")] = round(value, 6)
    return values


def csv_text(frame: pd.DataFrame) -> str:
    """`frame` as CSV with six decimals."""
    return frame.round(6).to_csv(index=False, lineterminator="\n")


def markdown_text(frame: pd.DataFrame) -> str:
    """`frame` as a Markdown table. Characters with a meaning in Markdown are escaped."""
    return aligned_text(frame.rename(columns=escape_markdown).map(escape_markdown), "github") + "\n"


def escape_markdown(value: object) -> str:
    """Text that Markdown shows literally, also in a cell of a table. Control characters become visible escapes."""
    return printable(" ".join(str(value).split())).translate(MARKDOWN_ESCAPES)


def aligned_text(frame: pd.DataFrame, style: str) -> str:
    """`frame` in a table format of tabulate, with the first column to the left and the others to the right."""
    names, align = list(frame.columns), ["left"] + ["right"] * (len(frame.columns) - 1)
    rows = frame.astype(str).values.tolist()
    return tabulate(rows, names, tablefmt=style, colalign=align, disable_numparse=True)
