"""The published results in published.csv, and the latency of a cascade."""

import re

import pytest

from rrcm.report import latency_tables, tables


def test_published_latencies_are_a_column_beside_the_accuracies():
    table = tables.published("imagenet", ["dds"])
    latencies = table[table["latency"] != ""].set_index("method")
    assert latencies["latency"].to_dict() == {"rRCM": "1", "DDS": "39", "DiffSmooth": "56", "DensePure": "171"}
    assert latencies.loc["DDS", "status"] == "here" and latencies.loc["DensePure", "status"] == "not run"
    assert "latency" not in tables.published("fashion_mnist", ["dds"])


PERCENTAGE = r"\d{1,3}\.\d"
PUBLISHED = {  # the columns of published.csv, and the patterns of their cells
    "dataset": "[a-z0-9_]+",
    "method": r"[\w -]+",
    "model": r"[\w =-]*",
    "sigma": r"\d\.\d+|best|not stated|",
    "n": r"\d+|",
    "acr": r"\d\.\d+|",
    "certified_accuracy": rf"(\d(\.\d+)?:{PERCENTAGE}(\({PERCENTAGE}\))?( |$))*",
    "latency": r"[1-9]\d*(\.\d+)?|",
    "source": r"[ -~σ]+",
}


def test_every_cell_of_published_csv_is_possible():
    rows = tables.read_published()
    assert list(rows) == list(PUBLISHED)
    assert not rows.duplicated(["dataset", "method", "model", "sigma", "n", "source"]).any()
    for line, row in enumerate(rows.to_dict("records"), start=2):
        for name, pattern in PUBLISHED.items():
            assert re.fullmatch(pattern, row[name], re.ASCII), f"line {line}: {name} {row[name]!r}"
        by_radius = tables.percentages(row["certified_accuracy"])
        radii, shares = list(by_radius), [100, *map(float, by_radius.values())]
        assert len(radii) == len(row["certified_accuracy"].split()) and radii == sorted(radii), f"line {line}: radii"
        assert shares == sorted(shares, reverse=True), f"line {line}: accuracies"
        assert radii or row["latency"], f"line {line}: neither accuracy nor latency"
    assert len(latency_tables.published_latencies()[["dataset", "n"]].drop_duplicates()) == 1  # one axis for all


def test_the_latency_of_a_cascade_adds_up_along_each_path():
    per_sample = {"sigma_0.25": [1e-3, 1e-3, 1e-3], "sigma_0.5": [2e-3, 4e-3, 3e-3]}
    seconds = {"predict_seconds": [0.1, 0.2, 0.3], "single_predict_seconds": [0.1, 0.1, 0.1]}
    record = {"cascades": {"rrcm_joint": {"seconds_per_sample": per_sample, **seconds}}}
    table = latency_tables.cascade_latency(record, [900], n0=100)
    numbers, text = table.numbers, table.text
    assert numbers["accepting"].tolist() == ["sigma_0.5", "sigma_0.25"]
    assert numbers["seconds_n_900"].tolist() == pytest.approx([3.0, 4.0])
    assert numbers["ratio"].tolist() == pytest.approx([1, 4 / 3])
    assert text["predict (s)"].tolist() == ["0.200 (0.100 to 0.300)"] * 2
