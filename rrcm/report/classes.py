"""Tables by class: certified accuracy, and which class the votes preferred where the right one is not certified."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from rrcm.config import Config
from rrcm.evaluation.classes import accuracy_by_class, confusions, preferred_classes
from rrcm.evaluation.metrics import accuracy_columns, average_certified_radius
from rrcm.methods import CASCADE
from rrcm.report.deployment import deployed_frames, deployment_label
from rrcm.report.inputs import Inputs
from rrcm.report.tables import Table, method_labels, reference_method

MANY = 20  # classes; of more, only the WORST are shown
WORST = 10
PAIRS = 10  # classes that are confused most often


class Deployed(NamedTuple):
    """A classifier that can be deployed, with its certificates."""

    method: str
    deployment: str  # a sigma or "cascade"
    frame: pd.DataFrame
    preferred: np.ndarray  # (N,) int64: the class that the votes preferred

    @property
    def label(self) -> str:
        """Such as `rRCM, one cascade` or `rRCM, σ = 0.5`."""
        name = deployment_label(self.deployment, 1).removesuffix(" alone")
        return f"{method_labels([self.method])[0]}, {name}"


def deployed_classifiers(config: Config, inputs: Inputs) -> list[Deployed]:
    """Each method at each sigma, and each cascade, all certified by the bound of `certify`."""
    deployed = []
    for (method, name), frame in deployed_frames(inputs.by_bound(config.certify.bound), inputs.cascades).items():
        sigmas = inputs.cascades[method].record.sigmas if name == CASCADE else None
        deployed.append(Deployed(method, name, frame, preferred_classes(frame, len(inputs.classes), sigmas)))
    return deployed


def choose_shown(deployed: Sequence[Deployed]) -> Deployed:
    """The classifier that the text shows: the first cascade, or the reference method at its sigma of highest ACR."""
    cascades = [each for each in deployed if each.deployment == CASCADE]
    reference = reference_method([each.method for each in deployed])
    singles = [each for each in deployed if each.method == reference]
    return cascades[0] if cascades else max(singles, key=lambda each: average_certified_radius(each.frame))


def shown_classes(by_class: pd.DataFrame, radii: Sequence[float]) -> list[int]:
    """The labels to show, of `accuracy_by_class`: all if they are few, else those with the lowest accuracy."""
    if len(by_class) <= MANY:
        return by_class["label"].tolist()
    return by_class.sort_values([radii[0], "acr", "label"])["label"].head(WORST).tolist()


def by_class(
    deployed: Sequence[Deployed], classes: Sequence[str], radii: Sequence[float], few: Sequence[float]
) -> Table:
    """Certified accuracy of each class with its 95 % Wilson interval, its ACR, and what was predicted instead.

    The numbers have all classifiers at all `radii`. The text has the classifier of `choose_shown` at a `few` radii.
    """
    rows = []
    for each in deployed:
        missed = confusions(each.frame, each.preferred).groupby("label")[["wrong", "abstained"]].sum()
        for row in accuracy_by_class(each.frame, radii).to_dict("records"):
            label, counts = row["label"], {"wrong": 0, "abstained": 0}
            counts |= missed.loc[label].to_dict() if label in missed.index else {}
            line = {"method": each.method, "deployment": each.deployment, "class": classes[label]}
            line |= {"images": row["images"]} | counts | {"acr": row["acr"]}
            rows.append(line | accuracy_columns([row[radius] for radius in radii], radii, row["images"]))
    return Table(pd.DataFrame(rows), _by_class_text(choose_shown(deployed), classes, few))


def _by_class_text(shown: Deployed, classes: Sequence[str], radii: Sequence[float]) -> pd.DataFrame:
    table, pairs = accuracy_by_class(shown.frame, radii), confusions(shown.frame, shown.preferred)
    table, rows = table.set_index("label"), []
    for label in shown_classes(table.reset_index(), radii):
        row, missed = table.loc[label], pairs[pairs["label"] == label]
        cells = {"class": classes[label], "images": f"{row['images']:,.0f}"}
        cells |= {f"r = {radius:g}": f"{100 * row[radius]:.1f}" for radius in radii}
        wrong = missed[missed["wrong"] > 0].sort_values("wrong", ascending=False, kind="stable")
        cells |= {"ACR": f"{row['acr']:.3f}"}
        cells["taken for"] = ", ".join(f"{classes[each.preferred]} ({each.wrong})" for each in wrong.itertuples())
        rows.append(cells | {"abstains": f"{missed['abstained'].sum()}"})
    return pd.DataFrame(rows)


def confusion(deployed: Sequence[Deployed], classes: Sequence[str]) -> Table:
    """Pairs of a class and the class that the votes preferred, for the images without a correct certificate.

    The numbers have all classifiers. The text has the PAIRS most frequent pairs of the classifier of `choose_shown`.
    """
    rows = []
    for each in deployed:
        for pair in confusions(each.frame, each.preferred).itertuples():
            line = {"method": each.method, "deployment": each.deployment, "class": classes[pair.label]}
            rows.append(line | {"preferred": classes[pair.preferred], "wrong": pair.wrong, "abstained": pair.abstained})
    columns = ["method", "deployment", "class", "preferred", "wrong", "abstained"]
    shown = choose_shown(deployed)
    most = confusions(shown.frame, shown.preferred).head(PAIRS)
    text = pd.DataFrame(
        {
            "class": [classes[label] for label in most["label"]],
            "votes prefer": [classes[label] for label in most["preferred"]],
            "wrong": most["wrong"].map(str),
            "abstains": most["abstained"].map(str),
        }
    )
    return Table(pd.DataFrame(rows, columns=columns), text)
