"""Tables as LaTeX, and the published results in published.csv."""

import re
from pathlib import Path

import pandas as pd
import pytest

from rrcm.report import tables
from rrcm.utils.errors import RRCMError


def test_latex_is_a_booktabs_table_with_escapes(invented_report):
    _, root = invented_report
    for name in ("best_sigma", "per_sigma", "differences", "budgets", "latency"):
        text = (root / f"reports/digits/{name}.tex").read_text()
        lines = text.splitlines()
        assert lines[0].startswith(r"\begin{tabular}{l")
        assert lines[-1] == r"\end{tabular}"
        assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        assert text.isascii()
        assert not re.search(r"(?<!\\)[_%#]", text)
        columns = {line.count("&") for line in lines if line.endswith(r"\\")}
        assert len(columns) == 1
    assert r"a\_b \& 50\% \#1 \$" in tables.latex_text(pd.DataFrame({"x_y": ["a_b & 50% #1 $"]}))


def test_published_latencies_are_a_column_beside_the_accuracies():
    table = tables.published("imagenet", ["dds"])
    latencies = table[table["latency"] != ""].set_index("method")
    assert latencies["latency"].to_dict() == {"rRCM": "1", "DDS": "39", "DiffSmooth": "56", "DensePure": "171"}
    assert latencies.loc["DDS", "status"] == "here" and latencies.loc["DensePure", "status"] == "not run"
    assert "latency" not in tables.published("fashion_mnist", ["dds"])


def test_published_rows_are_complete():
    rows = tables.read_published()
    assert not rows.duplicated(["dataset", "method", "model", "sigma", "n", "source"]).any()
    for row in rows.itertuples():
        cells = [re.fullmatch(r"([\d.]+):([\d.]+)(\([\d.]+\))?", text) for text in row.certified_accuracy.split()]
        assert (cells or float(row.latency) > 0) and all(cells) and row.dataset and row.method and row.source
        radii, shares = ([float(cell[i]) for cell in cells] for i in (1, 2))
        assert radii == sorted(set(radii)) and shares == sorted(shares, reverse=True) and max(shares, default=0) <= 100
    assert len(tables.published_latencies()[["dataset", "n"]].drop_duplicates()) == 1  # one axis for all


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.25:61.2 0.5:42.2", "0.25:61.2 0.5z42.2", "row 2: certified_accuracy"),
        ("0.25:61.2 0.5:42.2", "0.25:61.2 0.5:72.2", "row 2: certified_accuracy"),
        ("0.25:61.2 0.5:42.2", "0.5:61.2 0.25:42.2", "row 2: certified_accuracy"),
        ("0.25:61.2", "0.25:161.2", "row 2: certified_accuracy"),
        ("0.424", "-0.424", "row 2: acr"),
        ("100000", "1e5", "row 2: n '1e5'"),
        ("Gaussian", "Gauss\x01an", "row 2: method"),
        ("dataset,", "data,", "must have the columns dataset, method"),
    ],
)
def test_published_rows_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str):
    text = (Path(tables.__file__).parent / "published.csv").read_text()
    assert old in text
    (tmp_path / "published.csv").write_text(text.replace(old, new, 1))
    monkeypatch.setattr(tables, "files", lambda package: tmp_path)
    with pytest.raises(RRCMError, match=re.escape(message)):
        tables.read_published()
