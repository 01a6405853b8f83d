"""How many labels does it take until pre-training no longer pays? Trials with few labels, and their figure.

    python benchmarks/labels.py run WORK 0.5 profile=digits --labels 1 3 13 --seeds 3    # digits, sigma 0.5
    python benchmarks/labels.py figure WORK labels.png

`run` trains and certifies each of METHODS with `benchmarks/trials.py`, for each number of labels per class and for all
labels. All methods have the total compute of rRCM, and pre-training sees all images. Certified are images of the `val`
split, which select no weights. Started again, it continues. Each row of WORK/labels.csv is one trial. Two processes at
once need a folder and `--methods` each; name both folders to draw them together, as `figure WORK OTHER labels.png`.
`figure` also prints the ACR of rRCM minus the ACR of training from scratch with the same loss, paired over images.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rrcm.utils.app import resume_gc
from rrcm.evaluation.metrics import acr_difference, certified_radii, mean_over_seeds
from rrcm.evaluation.runs import MIN_RUNS
from rrcm.report.figures import OKABE_ITO, figure_style, save

resume_gc()
TRIALS = Path(__file__).resolve().parent / "trials.py"
METHODS = {  # label, marker
    "rrcm": ("rRCM, then consistency", "o"),
    "dmae": ("DMAE, then consistency", "s"),
    "consistency_matched": ("Consistency from scratch", "^"),
    "smoothadv_matched": ("SmoothAdv from scratch", "D"),
    "rrcm_smoothadv": ("rRCM, then SmoothAdv", "v"),
}
PAIRS = {"rrcm": "consistency_matched", "rrcm_smoothadv": "smoothadv_matched"}  # with the same loss
ALL = "all"


def run(given: argparse.Namespace) -> None:
    """Train and certify whatever WORK/labels.csv lacks."""
    table, budgets = given.work / "labels.csv", [*given.labels, ALL]
    for seed in range(given.seeds):
        for labels in budgets:
            for method in given.methods:
                done = pd.read_csv(table, dtype={"labels": str}) if table.exists() else pd.DataFrame()
                key = {"method": method, "sigma": given.sigma, "labels": str(labels), "seed": seed}
                if len(done) and (done[list(key)] == pd.Series(key)).all(axis=1).any():
                    continue
                limit = [] if labels == ALL else [f"data.labels_per_class={labels}"]
                overrides = [*given.overrides, f"seed={seed}", "pretrain.objectives=[rrcm,dmae]", *limit]
                overrides += ["pretrain.equal_passes=true", "finetune.equal_passes=true"]
                command = [sys.executable, TRIALS, given.work, method, str(given.sigma), *overrides]
                subprocess.run([*command, "--n", str(given.n), "--images", str(given.images)], check=True)
                row = pd.read_csv(given.work / "trials.csv").iloc[-1:]
                pd.concat([done, row.assign(**key)]).to_csv(table, index=False)


@figure_style()
def draw(rows: pd.DataFrame) -> Figure:
    """ACR against labels per class, one line for each method: the mean over seeds, with its t interval."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    budgets = sorted({int(labels) for labels in rows["labels"] if labels != ALL})
    names = [*map(str, budgets), *([ALL] if ALL in set(rows["labels"]) else [])]
    for k, (method, (label, marker)) in enumerate(METHODS.items()):
        by_labels = {
            name: values.to_numpy() for name, values in rows[rows["method"] == method].groupby("labels")["ACR"]
        }
        shown = [name for name in names if name in by_labels]
        intervals = [mean_over_seeds(by_labels[name]) for name in shown]
        halves = [
            each.high - each.value if len(by_labels[name]) >= MIN_RUNS else 0.0
            for name, each in zip(shown, intervals, strict=True)
        ]
        places = [names.index(name) + 0.06 * (k - 2) for name in shown]  # side by side
        values = [each.value for each in intervals]
        axes.errorbar(places, values, halves, label=label, marker=marker, color=OKABE_ITO[k], capsize=3)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("labelled training images per class")
    axes.set_ylabel(f"average certified radius, σ = {rows['sigma'].iloc[0]:g}")
    axes.legend(loc="lower right")
    return figure


def read_rows(work: Path) -> pd.DataFrame:
    """The trials of a folder, with the paths of their certificates."""
    rows = pd.read_csv(work / "labels.csv", dtype={"labels": str})
    return rows.assign(certificates=[str(work / name) for name in rows["certificates"]])


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """The ACR of each method of PAIRS minus the ACR of its partner, which starts from scratch, as a mean over seeds.

    One row per method and number of labels: `difference`, and `low` and `high` of the paired 95 % interval over images.
    """
    found = []
    for method, scratch in PAIRS.items():
        for labels, of_labels in rows.groupby("labels", sort=False):
            files = of_labels.pivot_table("certificates", "seed", "method", aggfunc="last")
            if {method, scratch} <= set(files):
                both = files[[method, scratch]].dropna()
                gain = acr_difference(*(mean_frame(both[name]) for name in (method, scratch)))
                found.append((method, labels, len(both), *gain))
    return pd.DataFrame(found, columns=["method", "labels", "seeds", "difference", "low", "high"])


def mean_frame(paths: Sequence[str]) -> pd.DataFrame:
    """The certified radius of each image as a mean over seeds, as a frame of certificates that are all correct."""
    radii = np.mean([certified_radii(pd.read_csv(path)) for path in paths], axis=0)
    return pd.DataFrame({"radius": radii, "correct": 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("work", type=Path)
    runs.add_argument("sigma", type=float)
    runs.add_argument("overrides", nargs="*")
    runs.add_argument("--labels", type=int, nargs="+", required=True, help="labelled images per class")
    runs.add_argument("--seeds", type=int, default=3)
    runs.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    runs.add_argument("--n", type=int, default=1000, help="samples per image")
    runs.add_argument("--images", type=int, default=500, help="validation images")
    figure = commands.add_parser("figure")
    figure.add_argument("work", type=Path, nargs="+")
    figure.add_argument("output", type=Path)
    given = parser.parse_args()
    if given.command == "run":
        run(given)
        return
    rows = pd.concat(map(read_rows, given.work))
    rows = rows.sort_values("labels", key=lambda names: names.replace(ALL, "inf").astype(float), kind="stable")
    print(rows.pivot_table("ACR", "labels", "method", sort=False).to_string(float_format="{:.3f}".format))
    print(differences(rows).to_string(index=False, float_format="{:.3f}".format))
    save(draw(rows), given.output)


if __name__ == "__main__":
    main()
