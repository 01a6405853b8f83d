"""The figure of representations: their k-NN accuracy and their cosines during pre-training."""

from collections.abc import Mapping
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rrcm.report.figures import TEXT_COLOR, figure_style, series_id
from rrcm.report.panels import draw_legend


@figure_style()
def draw_representation(representations: Mapping[str, pd.DataFrame]) -> Figure:
    """Evaluations of the representations during pre-training, with one row of panels per objective.

    Each frame is a representation.csv: one row per step and pixel sigma (0: clean images), with the columns of
    `rrcm.evaluation.representations.Evaluation`.
    """
    figure = Figure(figsize=(8.7, 0.4 + 2.7 * len(representations)))
    rows = figure.subplots(len(representations), 3, squeeze=False)
    for (accuracy, cosine, centred), (name, frame) in zip(rows, representations.items(), strict=True):
        sigmas = sorted(frame["sigma"].unique())
        shades = np.linspace(0.75, 0.0, len(sigmas))
        for i, (sigma, shade, marker) in enumerate(zip(sigmas, shades, cycle("osD^v"), strict=False)):
            run = frame[frame["sigma"] == sigma]
            style = {"color": matplotlib.colormaps["cividis"](shade), "marker": marker, "markersize": 3.5}
            style["gid"] = series_id(f"sigma-{i}")
            label = f"σ = {sigma:g}" if sigma else "clean"
            accuracy.plot(run["step"], 100 * run["knn"], label=label, **style)
            if sigma:
                cosine.plot(run["step"], run["same_image_cosine"], label=label, **style)
                cosine.plot(run["step"], run["cross_image_cosine"], linestyle=":", linewidth=1, **style)
                centred.plot(run["step"], run["centred_cosine"], label=label, **style)
        cosine.plot([], [], "-", color=TEXT_COLOR, label="same image")
        cosine.plot([], [], ":", color=TEXT_COLOR, linewidth=1, label="other images")
        before = "" if len(representations) == 1 else f"{name}: "
        accuracy.set(xlabel="step", ylabel="accuracy (%)", ylim=(0, 102), title=f"{before}k-NN accuracy")
        for axes, title in ((cosine, "cosine, noisy to clean"), (centred, "cosine, same image, centred")):
            axes.set(xlabel="step", ylabel="mean cosine", title=title)
            axes.set_ylim(min(0, axes.get_ylim()[0]), 1.02)
    draw_legend(figure, rows[0])
    return figure
