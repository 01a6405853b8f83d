"""Tables about the votes themselves: the probability of the right class, and the calibration of vote shares."""

import pandas as pd
from scipy.special import ndtri

from rrcm.evaluation.calibration import calibration_error, reliability
from rrcm.evaluation.classes import top_shares
from rrcm.evaluation.metrics import Certificates, certified_share
from rrcm.report.tables import Table, method_labels

PROBABILITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def probabilities(certificates: Certificates) -> Table:
    """The share of images that are classified correctly with a lower bound on p_A of at least each of PROBABILITIES.

    p_A is the probability of the class under noise (Cohen et al. 2019). A certified radius R by the binary bound says
    p_A >= Phi(R / sigma), so the share at p is the certified accuracy at sigma Phi^-1(p). The distribution over images
    is what Sun (ICML 2025) asks for in place of the ACR, which easy images dominate.
    """
    rows = []
    for (method, sigma), frame in certificates.items():
        for p in PROBABILITIES:
            radius = sigma * float(ndtri(p))
            share = certified_share(frame, radius)
            row = {"method": method, "sigma": sigma, "p": p, "radius": radius, "share": share.value}
            rows.append(row | {"low": share.low, "high": share.high, "images": len(frame)})
    numbers = pd.DataFrame(rows)
    text = []
    for (method, sigma), group in numbers.groupby(["method", "sigma"], sort=False):
        text.append({"method": method_labels([method])[0], "σ": f"{sigma:g}"})
        text[-1] |= {f"p ≥ {row.p:g}": f"{100 * row.share:.1f}" for row in group.itertuples()}
    return Table(numbers, pd.DataFrame(text))


def calibration(certificates: Certificates) -> Table:
    """The expected calibration error (ECE) of the vote shares of each model, with its standard error, and the mean
    share beside the accuracy. The shares come from the selection samples, which every image has.

    The numbers also have a row for each bin of the reliability diagram; the rows without `bin_share` are of all images.
    """
    rows, text = [], []
    for (method, sigma), frame in certificates.items():
        top, shares = top_shares(frame)
        right = top == frame["label"].to_numpy()
        error, standard_error = calibration_error(shares, right)
        row = {"method": method, "sigma": sigma}
        both = {"accuracy": float(right.mean()), "ece": error, "ece_se": standard_error}
        rows.append(row | {"images": len(frame), "share": float(shares.mean())} | both)
        bins = reliability(shares, right).rename(columns={"share": "bin_share"})
        rows += [row | each for each in bins.to_dict("records")]
        text.append({"method": method_labels([method])[0], "σ": f"{sigma:g}"})
        text[-1] |= {"mean share": f"{100 * shares.mean():.1f}", "right": f"{100 * right.mean():.1f}"}
        text[-1]["ECE"] = f"{100 * error:.1f} ± {100 * standard_error:.1f}"
    return Table(pd.DataFrame(rows), pd.DataFrame(text))
