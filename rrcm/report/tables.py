"""TODO docstring."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from rrcm.certification.results import sigma_name
from rrcm.config import METHODS
from rrcm.evaluation.metrics import (
    Certificates,
    average_certified_radius,
    best_sigma_table,
    certified_accuracy,
    mean_samples,
    per_sigma_table,
)
from rrcm.utils.files import write_text


def _tables(
    certificates: Certificates,
    others: Certificates,
    radii: list[float],
    budgets: pd.DataFrame,
    latency: Mapping[str, dict],
) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Each table twice: full numbers under names for machines, and text for people."""
    best = best_sigma_table(certificates, radii)
    cells = best.assign(
        cell=[f"{100 * row.certified_accuracy:.1f} ({100 * row.at_zero:.1f})" for row in best.itertuples()],
        column=[f"r = {radius:g}" for radius in best["radius"]],
        method=_labels(best["method"]),
    )
    best_shown = cells.pivot(index="method", columns="column", values="cell")
    best_shown = best_shown.loc[cells["method"].unique(), cells["column"].unique()].reset_index()

    marked = {(f"{label} (others' file)", sigma): frame for (label, sigma), frame in others.items()}
    sigmas = per_sigma_table({**certificates, **marked}, radii)
    sigmas_shown = sigmas.assign(
        method=_labels(sigmas["method"]),
        samples=["" if np.isnan(mean) else f"{mean:,.0f}" for mean in sigmas["samples"]],
        acr=[f"{acr:.3f}" for acr in sigmas["acr"]],
    )
    for radius in radii:
        sigmas_shown[radius] = [f"{100 * share:.1f}" for share in sigmas[radius]]
    sigmas_shown = sigmas_shown.rename(columns={"acr": "ACR"} | {radius: f"r = {radius:g}" for radius in radii})
    sigmas = sigmas.rename(columns={radius: f"r_{radius:g}" for radius in radii})

    passes = {
        "fine-tuning": "finetune_passes",
        "pre-training share": "pretrain_share_passes",
        "total": "total_passes",
    }
    seconds = {
        "fine-tuning (s)": "finetune_seconds",
        "pre-training share (s)": "pretrain_share_seconds",
        "certification (s)": "certify_seconds",
    }
    budgets_shown = pd.DataFrame(
        {"method": _labels(budgets["method"]), "sigma": budgets["sigma"]}
        | {f"{name} (M passes)": [f"{value / 1e6:,.2f}" for value in budgets[key]] for name, key in passes.items()}
        | {name: [f"{value:,.0f}" for value in budgets[key]] for name, key in seconds.items()}
    )
    tables = {
        "best_sigma": (best, best_shown),
        "per_sigma": (sigmas, sigmas_shown),
        "budgets": (budgets, budgets_shown),
    }
    if latency:
        numbers = pd.DataFrame(
            {name: record[name] for name in ("method", "parameters", "device", "dtype", "batch_size")}
            | {f"seconds_n_{n}": seconds for n, seconds in record["seconds"].items()}
            for record in latency.values()
        )
        shown = numbers.assign(
            method=_labels(numbers["method"]), parameters=[f"{count:,}" for count in numbers["parameters"]]
        )
        for name in numbers.columns[5:]:
            shown[name] = [f"{value:.3g}" for value in numbers[name]]
        tables["latency"] = (
            numbers,
            shown.rename(
                columns=lambda name: (
                    f"n = {int(name[10:]):,} (s)" if name[:10] == "seconds_n_" else name.replace("_", " ")
                )
            ),
        )
    return tables


def _labels(methods: pd.Series) -> list[str]:
    return [METHODS[name].label if name in METHODS else name for name in methods]


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_text(path, frame.round(6).to_csv(index=False, lineterminator="\n"))


def _markdown(frame: pd.DataFrame) -> str:
    return _tabulate(frame, "github") + "\n"


def _latex(frame: pd.DataFrame) -> str:
    """A booktabs table; special characters are escaped."""
    return _tabulate(frame, "latex_booktabs").replace("sigma", r"$\sigma$") + "\n"


def _tabulate(frame: pd.DataFrame, style: str) -> str:
    names, align = list(frame.columns), ["left"] + ["right"] * (len(frame.columns) - 1)
    rows = frame.astype(str).values.tolist()
    return tabulate(rows, names, tablefmt=style, colalign=align, disable_numparse=True)


def _curves(certificates: Certificates) -> pd.DataFrame:
    """Certified accuracy on a grid of radii that depends on sigma alone, so that experiments compare."""
    grids = []
    for (method, sigma), frame in certificates.items():
        radii = sigma * np.arange(81) / 20  # 4 sigma: beyond what 100,000 samples can certify
        accuracy = certified_accuracy(frame, radii)
        grids.append(pd.DataFrame({"method": method, "sigma": sigma, "radius": radii, "certified_accuracy": accuracy}))
    return pd.concat(grids)


def _metrics(certificates: Certificates, models: Mapping, radii: list[float]) -> dict:
    """For `dvc metrics` and `dvc exp show`: metric, method, sigma. DVC joins keys by dots, so none has one inside."""
    metrics: dict[str, dict] = {}
    for (method, sigma), frame in certificates.items():
        values = {
            "acr": average_certified_radius(frame),
            "samples": mean_samples(frame),
            "val_accuracy": models[method, sigma]["selected"]["val_accuracy"],
        }
        for radius, share in zip(radii, certified_accuracy(frame, radii).tolist(), strict=True):
            values[f"certified_r_{radius:g}".replace(".", "_")] = share
        for name, value in values.items():
            of_method = metrics.setdefault(name, {}).setdefault(method, {})
            of_method[sigma_name(sigma).replace(".", "_")] = round(value, 6)
    return metrics
