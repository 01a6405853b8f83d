"""Reports of several seeds are summarized in one table, and reports that cannot be compared are refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import stage

from rrcm.evaluation.metrics import mean_over_seeds
from rrcm.report.seed_curves import curves_over_seeds, with_best_sigma
from rrcm.report.seed_reports import read_curves, read_reports
from rrcm.report.seeds import FILES, over_seeds, over_seeds_and_images, seeds_text, write_seeds
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
    values = over_seeds(numbers).set_index(["method", "measure"])
    assert tuple(values.loc[("rrcm", "certified_accuracy"), ["value", "low", "high"]]) == pytest.approx(
        mean_over_seeds(ACCURACY["rrcm"])
    )
    differences = over_seeds_and_images(numbers.dropna(subset="difference"))
    assert differences["method"].tolist() == ["gaussian", "gaussian"]  # the reference has none
    expected = mean_over_seeds([-0.3, -0.25, -0.23])
    columns = ["difference", "low_over_seeds", "high_over_seeds"]
    assert tuple(differences.loc[0, columns]) == pytest.approx(expected)


@pytest.mark.slow
def test_the_command_prints_the_tables(reports: list[Path], tmp_path: Path):
    answer = stage(tmp_path, "seeds", *map(str, reports))
    assert (answer.returncode, answer.stdout) == (0, f"{seeds_text(reports)}\n")
    assert "with the best σ and ACR, mean over seeds 0, 1, 2." in answer.stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in answer.stdout.splitlines() if "|" in line]
    assert rows[0] == rows[4] == ["method", "r = 0.5", "ACR, σ = 1"]
    assert [row[0] for row in (rows[2], rows[3], rows[6])] == ["rRCM", "Gaussian", "Gaussian"]
    assert rows[6][1:] == ["-26.0 (-100.0 to 74.4)", "-0.130 (-1.131 to 0.871)"]  # cut at -100


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


def add_tables(report: Path, seed: int, joint: float, ratio: float = 1.5) -> None:
    """Add the tables of a joint method and of a cascade to a report, whose differences have these values."""
    rows = [[seed, "rrcm_joint", "certified_accuracy", 0.5, 0.8, joint], [seed, "rrcm_joint", "acr", 1.0, 0.4, joint]]
    frame = pd.DataFrame(rows, columns=["seed", "method", "measure", "at", "value", "difference"])
    frame = frame.assign(low=joint - 0.03, high=joint + 0.05, images=120)
    frame.to_csv(report / "joint.csv", index=False)
    frame.to_csv(report / "deployment_differences.csv", index=False)
    rows = [["rrcm_joint", "binary", "cascade", 1, 120, 0.5 + joint, 0.4, ratio]]
    rows += [["rrcm_joint", "binary", "best", 3, 120, 0.6, None, None]]
    columns = ["method", "bound", "deployment", "deployments", "images", "r_0.5", "acr", "samples_ratio"]
    pd.DataFrame(rows, columns=columns).to_csv(report / "deployment.csv", index=False)


JOINT = [0.01, 0.02, 0.06]  # difference by seed


@pytest.fixture
def cascades(reports: list[Path]) -> list[Path]:
    for seed, report in enumerate(reports):
        add_tables(report, seed, JOINT[seed])
    return reports


def test_joint_methods_and_cascades_are_pooled_over_seeds_and_images(cascades: list[Path]):
    pooled = over_seeds_and_images(read_reports(cascades, "joint.csv"))
    mean = mean_over_seeds(JOINT)
    half = np.hypot(mean.high - mean.value, 0.04)
    assert tuple(pooled.loc[0, ["difference", "low", "high"]]) == pytest.approx((0.03, 0.03 - half, 0.03 + half))
    text = seeds_text(cascades)
    assert "Joint networks minus their experts, mean over seeds 0, 1, 2." in text
    assert f"3.0 ({100 * (0.03 - half):.1f} to {100 * (0.03 + half):.1f})" in text
    assert "One cascade minus the best σ at each radius" in text and "covers the training runs and the test" in text
    row = next(line for line in text.splitlines() if "one cascade " in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    ends = f"{100 * (mean.low + 0.5):.1f} to {100 * (mean.high + 0.5):.1f}"
    assert cells == ["rRCM, joint", "one cascade", f"53.0 ({ends})", "0.400 (0.400 to 0.400)", "1.50 (1.50 to 1.50)"]
    assert "best σ at each radius (three deployments) | 60.0 (60.0 to 60.0) | | |" in " ".join(text.split())


def test_the_interval_over_seeds_and_images_covers_both(cascades: list[Path]):
    """Invented seeds and images: the true mean difference is missed in at most 5 % of the runs, but for chance."""
    rng, runs, seeds, images = np.random.default_rng(0), 400, 3, 100
    missed = 0
    for _ in range(runs):
        by_image = rng.normal(0, 1, images)  # the same images with every seed
        differences = by_image + rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, 0.5, (seeds, images))
        mean, spread = differences.mean(1), 1.96 * differences.std(1, ddof=1) / np.sqrt(images)
        frame = pd.DataFrame({"method": "m", "measure": "acr", "at": 1.0, "difference": mean})
        pooled = over_seeds_and_images(frame.assign(low=mean - spread, high=mean + spread))
        missed += not pooled.loc[0, "low"] <= 0 <= pooled.loc[0, "high"]
    assert missed / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_two_seeds_have_no_interval(cascades: list[Path]):
    text = seeds_text(cascades[:2])
    assert "Fewer than 3 seeds have no interval over seeds." in text and "In parentheses" not in text
    assert "(" not in text.replace("accuracy (%)", "").replace("(three deployments)", "") and "±" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: (report / "joint.csv").unlink(), "seed_1: has no joint.csv; run all seeds"),
        (lambda report: (report / "deployment.csv").write_text("method\n1\n"), "has no bound; run `dvc repro plot`"),
        (lambda report: write(report, "deployment.csv", ",0.6,", ",1.6,"), "a value that is no share"),
        (lambda report: write(report, "deployment.csv", ",0.6,", ",x,"), "text where numbers must be"),
        (lambda report: write(report, "deployment.csv", "best,3", "best,2"), "has other cascades, sigmas or radii"),
        (lambda report: write(report, "deployment.csv", "binary", "margin"), "has other cascades, sigmas or radii"),
        (lambda report: write(report, "joint.csv", "1.0,0.4", "0.5,0.4"), "compares other methods, radii or sigmas"),
        (lambda report: write(report, "joint.csv", "0.8,0.02", "0.8,"), "has a method without a difference"),
    ],
)
def test_tables_of_cascades_that_cannot_be_pooled_are_refused(cascades: list[Path], change, message: str):
    change(cascades[1])
    with pytest.raises(RRCMError, match=message) as caught:
        seeds_text(cascades)
    assert "\n" not in str(caught.value)


def write(report: Path, name: str, old: str, new: str) -> None:
    """Replace a text in a table."""
    text = (report / name).read_text()
    assert old in text
    (report / name).write_text(text.replace(old, new))


def test_intervals_of_shares_stay_on_their_scale():
    """The t interval of 0.9, 0.95 and 1 ends at 1.07."""
    frame = pd.DataFrame({"method": "m", "measure": "certified_accuracy", "at": 0.0, "value": [0.9, 0.95, 1.0]})
    mean, (row,) = mean_over_seeds(frame["value"]), over_seeds(frame).itertuples()
    assert mean.high > 1.07 and (row.value, row.low, row.high) == pytest.approx((0.95, mean.low, 1.0))
    (row,) = over_seeds(frame.assign(measure="acr")).itertuples()
    assert row.high == mean.high
    gain = frame.assign(difference=[-0.9, -1.0, -0.95], low=-1.0, high=-0.8)
    (row,) = over_seeds_and_images(gain).itertuples()
    assert row.low == row.low_over_seeds == -1.0 < row.high_over_seeds < row.high


def write_curves(report: Path, seed: int) -> None:
    """Two methods whose certified accuracy falls by a tenth at each radius; sigma 1 is better from radius 0.2 on."""
    rows = []
    for method, start in (("rrcm", 0.9 + 0.05 * seed), ("gaussian", 0.6)):
        rows += [[method, 0.5, radius, start - radius] for radius in (0.0, 0.1, 0.2, 0.3)]
        rows += [[method, 1.0, radius, start - 0.15 - radius / 4] for radius in (0.0, 0.2, 0.4)]
    columns = ["method", "sigma", "radius", "certified_accuracy"]
    pd.DataFrame(rows, columns=columns).to_csv(report / "curves.csv", index=False)


@pytest.fixture
def drawn(cascades: list[Path]) -> list[Path]:
    for seed, report in enumerate(cascades):
        write_curves(report, seed)
    return cascades


def test_the_best_sigma_of_each_run_is_taken_at_its_radii(drawn: list[Path]):
    curves = with_best_sigma(read_curves(drawn))
    best = curves[(curves["sigma"] == "best") & (curves["run"] == 0) & (curves["method"] == "rrcm")]
    assert best["radius"].tolist() == [0.0, 0.2, 0.4]
    assert best["certified_accuracy"].tolist() == pytest.approx([0.9, 0.7, 0.65])
    means = curves_over_seeds(read_curves(drawn), intervals=True).set_index(["method", "sigma", "radius"])
    assert tuple(means.loc[("rrcm", "0.5", 0.0)]) == pytest.approx(mean_over_seeds([0.9, 0.95, 1.0]).cut(0, 1))
    assert curves_over_seeds(read_curves(drawn), intervals=False)["low"].isna().all()


def test_the_report_is_a_folder_that_is_written_again_but_nothing_else(drawn: list[Path], tmp_path: Path):
    output = tmp_path / "pooled"
    for reports in (drawn[:2], drawn):
        write_seeds(reports, output)
        assert {path.name for path in output.iterdir()} == FILES
        page = (output / "report.md").read_text()
        assert seeds_text(reports) in page and "![certified accuracy](certified_accuracy.png)" in page
        assert ("Each point is a seed." in page) == (len(reports) == 2)
    row = pd.read_csv(output / "differences.csv").iloc[0]
    assert row["low"] < row["low_over_seeds"] < row["difference"] < row["high_over_seeds"] < row["high"]
    (output / "mine.txt").touch()
    with pytest.raises(RRCMError, match="pooled: has other files than a report of several seeds; choose"):
        write_seeds(drawn, output)
    assert (output / "mine.txt").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.9", "9.0", "a value that is no share"),
        ("0.9", "x", "text where numbers must be"),
        ("rrcm,0.5", "mine,0.5", "the unknown method mine"),
        ("rrcm,0.5,0.1", "rrcm,0.5,0.11", "has other methods, sigmas or radii than"),
        ("radius", "r", "has no radius; run `dvc repro plot` again"),
    ],
)
def test_impossible_curves_are_refused(drawn: list[Path], tmp_path: Path, old: str, new: str, message: str):
    write(drawn[0], "curves.csv", old, new)
    with pytest.raises(RRCMError, match=message):
        write_seeds(drawn, tmp_path / "pooled")
    assert not (tmp_path / "pooled").exists()
