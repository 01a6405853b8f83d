"""Reports of several seeds are summarized in one table, and reports that cannot be compared are refused."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import stage

from rrcm.evaluation.metrics import mean_over_seeds
from rrcm.report.seeds import over_seeds, read_reports, seeds_text
from rrcm.utils.errors import RRCMError

ACCURACY = {"rrcm": [0.9, 0.8, 0.88], "gaussian": [0.6, 0.55, 0.65]}  # by seed


def write_report(folder: Path, seed: int, **changes: list) -> Path:
    """Write differences.csv of a report. The ACR at sigma 1 is half of the certified accuracy at r = 0.5."""
    rows = []
    for method, values in ACCURACY.items():
        for measure, at, scale in (("certified_accuracy", 0.5, 1.0), ("acr", 1.0, 0.5)):
            difference = values[seed] - ACCURACY["rrcm"][seed] if method != "rrcm" else None
            difference = None if difference is None else scale * difference
            rows.append([seed, method, measure, at, scale * values[seed], difference])
    frame = pd.DataFrame(rows, columns=["seed", "method", "measure", "at", "value", "difference"])
    folder.mkdir()
    frame.assign(low=-1.0, high=1.0, **changes).to_csv(folder / "differences.csv", index=False)
    return folder


@pytest.fixture
def reports(tmp_path: Path) -> list[Path]:
    return [write_report(tmp_path / f"seed_{seed}", seed) for seed in range(3)]


def test_means_over_seeds_and_the_interval_of_their_differences(reports: list[Path]):
    numbers = read_reports(reports)
    values = over_seeds(numbers, "value").set_index(["method", "measure"])
    assert tuple(values.loc[("rrcm", "certified_accuracy"), ["value", "low", "high"]]) == pytest.approx(
        mean_over_seeds(ACCURACY["rrcm"])
    )
    differences = over_seeds(numbers, "difference")
    assert differences["method"].tolist() == ["gaussian", "gaussian"]  # the reference has none
    expected = mean_over_seeds([-0.3, -0.25, -0.23])
    assert tuple(differences.loc[0, ["difference", "low", "high"]]) == pytest.approx(expected)


def test_the_command_prints_the_tables(reports: list[Path], tmp_path: Path):
    answer = stage(tmp_path, "seeds", *map(str, reports))
    assert (answer.returncode, answer.stdout) == (0, f"{seeds_text(reports)}\n")
    assert "with the best σ and ACR, mean over seeds 0, 1, 2." in answer.stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in answer.stdout.splitlines() if "|" in line]
    assert rows[0] == rows[4] == ["method", "r = 0.5", "ACR, σ = 1"]
    assert [row[0] for row in (rows[2], rows[3], rows[6])] == ["rRCM", "Gaussian", "Gaussian"]
    assert rows[6][1:] == ["-26.0 (-35.0 to -17.0)", "-0.130 (-0.175 to -0.085)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: [folder / "seed_0"], "at least two seeds"),
        (lambda folder: [folder / "seed_0", folder / "none"], "none/differences.csv: no such file"),
        (lambda folder: [folder / "seed_0", write_report(folder / "again", 0)], "again: has seed 0 like"),
        (lambda folder: [folder / "seed_0", write_report(folder / "at", 1, at=9.0)], "at: compares other methods"),
        (lambda folder: [folder / "seed_0", write_report(folder / "empty", 1).with_name("old")], "no such file"),
    ],
)
def test_reports_that_cannot_be_compared_are_refused(reports: list[Path], tmp_path: Path, change, message: str):
    with pytest.raises(RRCMError, match=message) as caught:
        seeds_text(change(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_table_without_a_column_is_refused(reports: list[Path]):
    path = reports[1] / "differences.csv"
    path.write_text(path.read_text().replace("seed,", "sed,"))
    with pytest.raises(RRCMError, match="has no seed; run `dvc repro plot` again"):
        seeds_text(reports)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.9", "9.9", "a value that is no share"),
        ("0.9", "0,9", "text where numbers must be"),
        ("0.9", "x", "text where numbers must be"),
        ("0.9", "inf", "a value that is no share"),
        ("\n0,", "\n1,", "has not one whole seed"),
        ("acr", "acx", "has measures other than certified_accuracy and acr"),
        ("-1.0,1.0", "1.0,-1.0", ""),
        ("-0.15000000000000002,-1.0", "-0.15,-0.1", "outside its interval"),
        (
            "-0.15000000000000002,-1.0",
            ",-1.0",
            "has not one method without a difference",
        ),
    ],
)
def test_impossible_numbers_are_refused(reports: list[Path], old: str, new: str, message: str):
    path = reports[0] / "differences.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    if message:
        with pytest.raises(RRCMError, match=message):
            seeds_text(reports)
    else:
        seeds_text(reports)  # the reference has no difference, so its interval means nothing


def test_a_published_result_means_the_reports_of_all_its_seeds(tmp_path: Path):
    for seed in range(3):
        (tmp_path / f"published/seed_{seed}").mkdir(parents=True)
        write_report(tmp_path / f"published/seed_{seed}/report", seed)
    reports = [tmp_path / f"published/seed_{seed}/report" for seed in range(3)]
    assert seeds_text([tmp_path / "published"]) == seeds_text(reports)
