"""The figure of one deployment: a cascade, each of its sigmas alone, and the best sigma at each radius."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rrcm.certification.cascade_rules import MULTI_SCALE
from rrcm.evaluation.metrics import Certificates
from rrcm.methods import CASCADE, METHODS
from rrcm.report.accuracy_figures import draw_curve, set_axes
from rrcm.report.cascade_inputs import Cascade
from rrcm.report.deployment import BEST, deployment_label, single_sigmas
from rrcm.report.figures import figure_style, series_id
from rrcm.report.panels import draw_legend

LIGHT, DARK = 0.7, 0.3  # greys of the smallest and the largest sigma
MARKERS = "osv^DPX"  # of the sigmas, by increasing sigma


@figure_style()
def draw_deployment(cascades: Mapping[str, Cascade], certificates: Certificates) -> Figure:
    """Exact curves of certified accuracy against radius, with a panel for each method.

    `certificates` belong to single sigmas, by the bound of the cascades.
    """
    columns = min(len(cascades), 2)
    rows = -(-len(cascades) // columns)
    figure = Figure(figsize=(6.4 if columns == 1 else 4.2 * columns, 4.4 if len(cascades) == 1 else 0.9 + 2.8 * rows))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(cascades) :]:
        panel.remove()
    shown = panels.flat[: len(cascades)]
    own = deployment_label(CASCADE, 1)
    several = len({METHODS[method].colour for method in cascades}) > 1  # one line in the legend for each colour
    reach = max(
        _draw_method(panel, method, f"{own}: {METHODS[method].label}" if several else own, cascade, certificates)
        for panel, (method, cascade) in zip(shown, cascades.items(), strict=True)
    )
    for i, panel in enumerate(shown):
        set_axes(panel, reach or 1)
        panel.tick_params(labelbottom=True)
        if i % columns == 0:
            panel.set_ylabel("certified accuracy (%)")
    draw_legend(figure, shown)
    return figure


def _draw_method(panel: Axes, method: str, label: str, cascade: Cascade, certificates: Certificates) -> float:
    """Draw the curves of a method, whose cascade has this label, and return the largest radius."""
    singles, curves = single_sigmas(method, cascade, certificates), []
    strong = {"color": METHODS[method].colour, "linewidth": 2.4, "zorder": 3, "label": label, "gid": series_id(CASCADE)}
    curves.append(draw_curve(panel, [cascade.label_aware], **strong))
    if cascade.multi_scale is not None:
        dotted = {"color": "black", "linestyle": ":", "linewidth": 1.2, "zorder": 2, "gid": series_id(MULTI_SCALE)}
        curves.append(draw_curve(panel, [cascade.multi_scale], **dotted, label=deployment_label(MULTI_SCALE, 1)))
    dashed = {"color": "black", "linestyle": (0, (4, 1.5)), "linewidth": 1.2, "zorder": 4, "gid": series_id(BEST)}
    best = deployment_label(BEST, len(singles))
    curves.append(draw_curve(panel, list(singles.values()), **dashed, label=best))
    greys = np.linspace(LIGHT, DARK, len(singles))
    for i, ((_, sigma), frame) in enumerate(singles.items()):
        thin = {"color": str(greys[i]), "marker": MARKERS[i % len(MARKERS)], "linewidth": 0.9, "markersize": 3.5}
        alone = deployment_label(f"{sigma:g}", 1)
        thin |= {"zorder": 1.5, "label": alone, "gid": series_id(f"sigma-{i}")}
        curves.append(draw_curve(panel, [frame], (i + 0.5) / len(singles), **thin))
    panel.set_title(METHODS[method].label)
    return max(radii[-1] for radii, _ in curves)
