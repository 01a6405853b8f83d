"""The figure of training: losses of the pre-training, and validation accuracy under noise while fine-tuning."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from rrcm.report.figures import TEXT_COLOR, figure_style, line_style, series_id
from rrcm.report.panels import OTHERS, Group, draw_legends, panel_groups

NOT_LOSSES = {"step", "loss", "grad_norm", "levels", "teacher_decay", "lr"}  # columns of a pre-training's history


@figure_style()
def draw_training(pretraining: Mapping[str, pd.DataFrame], finetuning: pd.DataFrame) -> Figure:
    """Pre-training losses (nats) with the number of noise levels, and validation accuracy under noise per sigma.

    `pretraining` holds the history of each pre-training objective, which has a panel for its loss and one for its noise
    levels below. `finetuning` has one row per evaluation: method, sigma, compute (encoder forward passes, including the
    share of the pre-training), val_accuracy (a share, or missing), selected (bool). The marker on a line shows the
    selected weights.
    """
    sigmas = sorted(finetuning["sigma"].unique())
    groups = panel_groups(finetuning["method"])
    layout, ratios = _training_layout(list(pretraining), sigmas, len(groups))
    width = 2.9 * len(layout[0]) + 2.2 * (len(groups) > 1)
    figure = Figure(figsize=(max(width, 4.2), 0.4 + 0.78 * sum(ratios)))
    panels = figure.subplot_mosaic(layout, height_ratios=ratios)
    for name, history in pretraining.items():
        _draw_pretraining(panels[f"{name} loss"], panels[f"{name} levels"], history)
        panels[f"{name} loss"].set_title("pre-training" if len(pretraining) == 1 else f"pre-training, {name}")
    rows = np.array([[panels[f"{row} {sigma}"] for sigma in sigmas] for row in range(len(groups))])
    for column, sigma in enumerate(sigmas):
        runs = dict(iter(finetuning[finetuning["sigma"] == sigma].groupby("method", sort=False)))
        most = max(run["compute"].max() for run in runs.values())
        for panel, group in zip(rows[:, column], groups, strict=True):
            _draw_finetuning(panel, runs, group)
            panel.set(ylim=(0, 102), xlim=(0, 1.04 * most))
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.xaxis.set_major_locator(MaxNLocator(4))
            panel.tick_params(labelleft=column == 0, labelbottom=panel is rows[-1, column])
        rows[0, column].set_title(f"fine-tuning, σ = {sigma:g}")
        rows[-1, column].set_xlabel("compute (encoder forward passes)")
    for row in rows:
        row[0].set_ylabel("validation accuracy\nunder noise (%)")
    draw_legends(figure, rows, groups)
    return figure


def _training_layout(
    objectives: Sequence[str], sigmas: Sequence[float], groups: int
) -> tuple[list[list[str]], list[float]]:
    """The panels of each row and the relative heights of the rows.

    Pre-training is to the left of fine-tuning if there is at most one objective and one group, else above it.
    """
    if len(objectives) <= 1 and groups == 1:
        rows = [
            [*(f"{name} {part}" for name in objectives), *(f"0 {s}" for s in sigmas)] for part in ("loss", "levels")
        ]
        return rows, [3, 1]
    width = max(len(sigmas), min(3, len(objectives)))
    layout, ratios = [], []
    for first in range(0, len(objectives), width):
        names = objectives[first : first + width]
        layout += [[f"{name} {part}" for name in names] for part in ("loss", "levels")]
        ratios += [2.4, 1.1]
    for row in range(groups):
        layout.append([f"{row} {sigma}" for sigma in sigmas])
        ratios.append(2.8)
    return [[*row, *["."] * (width - len(row))] for row in layout], ratios


def _draw_finetuning(panel: Axes, runs: Mapping[str, pd.DataFrame], group: Group) -> None:
    """Draw the validation accuracies of one sigma: the methods of `group` in colour, the others in grey."""
    for method in [*group.others(runs), *group.methods]:
        evaluated = runs[method].dropna(subset="val_accuracy")
        kept = np.flatnonzero(evaluated["selected"]).tolist()
        style = (
            line_style(method) | {"markevery": kept} if method in group.methods else OTHERS | {"gid": series_id(method)}
        )
        panel.plot(evaluated["compute"], 100 * evaluated["val_accuracy"], **style)


def _draw_pretraining(losses: Axes, levels: Axes, history: pd.DataFrame) -> None:
    """Draw the terms of a pre-training's loss above, and the number of noise levels or the learning rate below."""
    terms = [name for name in history.columns if name not in NOT_LOSSES]
    for name, dashes in zip(terms, cycle(["-", ":", "--", "-."]), strict=False):
        losses.plot(history["step"], history[name], color=TEXT_COLOR, linestyle=dashes, label=name)
    losses.set(ylabel="loss" if "reconstruction" in terms else "loss (nats)", ylim=(0, None))
    losses.tick_params(labelbottom=False)
    losses.legend()
    name, label = ("levels", "levels N") if "levels" in history else ("lr", "learning rate")  # only rRCM has levels
    levels.step(history["step"], history[name], where="post", color=TEXT_COLOR)
    levels.set(xlabel="step", ylabel=label, ylim=(0, None))
    levels.sharex(losses)
