"""Tables of latencies: the seconds to certify and to predict an image, measured here and published elsewhere."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from rrcm.evaluation.metrics import (
    Interval,
)
from rrcm.report.tables import Table, method_labels, read_published, reference_method


def latency(record: Mapping, samples: Sequence[int], n0: int, budgets: pd.DataFrame) -> Table:
    """The seconds to certify an image with each n of `samples`, and the seconds that it took in this run.

    `record` is the record of the latency stage: it has the seconds per sample in each round, and one image takes n0 + n
    samples. The numbers are medians over the rounds with the range `low` to `high`. `ratio` is the time relative to the
    reference method in the same round. `budgets` is the field of `Inputs` with the time of the certifications.
    """
    methods = record["methods"]
    reference = reference_method(methods)
    rows, text = [], []
    for name, each in methods.items():
        per_sample = np.array(each["seconds_per_sample"])
        measured = {f"seconds_n_{n}": (n0 + n) * per_sample for n in samples}
        measured["ratio"] = per_sample / np.array(methods[reference]["seconds_per_sample"])
        spread = {key: Interval(np.median(values), values.min(), values.max()) for key, values in measured.items()}
        of_method = budgets[budgets["method"] == name]
        certified = of_method["certify_seconds"].sum() / of_method["images"].sum()
        passes, parameters = (each[key] for key in ("passes", "parameters"))
        rows.append({"method": name, "parameters": sum(parameters.values())})
        rows[-1] |= {f"{kind}_passes": passes[kind] for kind in passes} | {"batch_size": each["batch_size"]}
        for key, interval in spread.items():
            rows[-1] |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
        rows[-1]["certified_seconds"] = certified
        label = method_labels([name])[0]
        text.append({"method": label, "parameters": f"{sum(parameters.values()):,}"})
        text[-1] |= {"passes": " + ".join(f"{count:.3g}" for count in passes.values() if count)}
        text[-1] |= {"batch size": f"{each['batch_size']:,}"}
        text[-1] |= {f"n = {n:,} (s)": _range_text(spread[f"seconds_n_{n}"]) for n in samples}
        text[-1] |= {f"ratio to {method_labels([reference])[0]}": _range_text(spread["ratio"])}
        text[-1] |= {"as certified (s)": _three_digits(certified)}
    return Table(pd.DataFrame(rows), pd.DataFrame(text))


def cascade_latency(record: Mapping, samples: Sequence[int], n0: int) -> Table:
    """The seconds to certify an image by each path of a cascade, with each n of `samples` per sigma, and to predict.

    A path draws n0 + n samples at the sigma that accepts and at each larger one. `record` is as for `latency`. `ratio`
    is relative to the largest sigma alone, and the last columns have the seconds of PREDICT by the cascade and by the
    single classifier. The numbers are medians over the rounds with their range.
    """
    rows, text = [], []
    for name, each in record["cascades"].items():
        path, label = np.zeros(len(each["predict_seconds"])), method_labels([name])[0]
        largest = np.array(list(each["seconds_per_sample"].values())[-1])
        for sigma, seconds in reversed(each["seconds_per_sample"].items()):
            path = path + np.array(seconds)
            measured = {f"seconds_n_{n}": (n0 + n) * path for n in samples} | {"ratio": path / largest}
            measured |= {key: np.array(each[key]) for key in ("predict_seconds", "single_predict_seconds")}
            spread = {key: Interval(np.median(values), values.min(), values.max()) for key, values in measured.items()}
            rows.append({"method": name, "accepting": sigma})
            for key, interval in spread.items():
                rows[-1] |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
            text.append({"method": label, "accepting σ": f"{float(sigma.removeprefix('sigma_')):g}"})
            text[-1] |= {f"n = {n:,} (s)": _range_text(spread[f"seconds_n_{n}"]) for n in samples}
            text[-1] |= {"ratio": _range_text(spread["ratio"]), "predict (s)": _range_text(spread["predict_seconds"])}
            text[-1] |= {"predict, one σ (s)": _range_text(spread["single_predict_seconds"])}
    return Table(pd.DataFrame(rows), pd.DataFrame(text))


def _three_digits(value: float) -> str:
    """`value` with three significant digits, or rounded to a whole number if it has more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _range_text(spread: Interval) -> str:
    value, low, high = map(_three_digits, spread)
    return f"{value} ({low} to {high})"


def published_latencies() -> pd.DataFrame:
    """The rows of published.csv that have a latency, as text. All have the same data set and the same n."""
    rows = read_published()
    return rows[rows["latency"] != ""]
