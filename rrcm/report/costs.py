"""The table of what a certificate costs: samples, passes of the networks and seconds, as means over the images."""

import math
from collections.abc import Mapping

import pandas as pd

from rrcm.evaluation.metrics import Certificates, mean_samples
from rrcm.methods import CASCADE
from rrcm.report.cascade_inputs import Cascade
from rrcm.report.deployment import deployed_frames, deployment_label
from rrcm.report.tables import Table, method_labels, with_images


def certificate_costs(
    certificates: Certificates, cascades: Mapping[str, Cascade], budgets: pd.DataFrame, latency: Mapping | None
) -> Table:
    """Mean samples, passes and seconds per certified image, of each method at each sigma and of each cascade.

    `certificates` have the samples that were drawn, `budgets` (of `Inputs`) the seconds of the certifications, and
    `latency` the passes per sample. Without a record of latency there are no passes.
    """
    seconds = {(row.method, f"{row.sigma:g}"): row.certify_seconds for row in budgets.itertuples()}
    seconds |= {(method, CASCADE): cascade.seconds["certification"] for method, cascade in cascades.items()}
    rows = []
    for (method, deployment), frame in deployed_frames(certificates, cascades).items():
        samples = mean_samples(frame)
        per_sample = math.nan if latency is None else sum(latency["methods"][method]["passes"].values())
        row = {"method": method, "deployment": deployment, "samples": samples, "passes": samples * per_sample}
        rows.append(row | {"seconds": seconds[method, deployment] / len(frame), "images": len(frame)})
    numbers = pd.DataFrame(rows)
    text = pd.DataFrame({"method": method_labels(numbers["method"])})
    text["deployed"] = [deployment_label(name, 1).removesuffix(" alone") for name in numbers["deployment"]]
    text["samples"] = [f"{mean:,.0f}" for mean in numbers["samples"]]
    if latency is not None:
        text["passes"] = [f"{mean:,.0f}" for mean in numbers["passes"]]
    text["seconds"] = [f"{mean:#.3g}" for mean in numbers["seconds"]]
    return Table(numbers, with_images(text, numbers["images"].tolist()))
