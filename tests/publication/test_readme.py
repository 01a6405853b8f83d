"""Every cell of the table of results in README.md comes from a published result, and a changed cell is named."""

import re
import shutil

import pandas as pd
import pytest
from conftest import REPOSITORY

from rrcm.publication.readme import BLOCK, README, check_readme, missing_results, result_rows, write_readme
from rrcm.utils.errors import RRCMError

HEAD = "label,result,method,model,sigma\n"


@pytest.fixture
def root(tmp_path):
    """A repository with two seeds of a published result, each with the tables that README.md needs."""
    for seed, share in enumerate((0.5, 0.75)):
        report = tmp_path / f"results/tiny/seed_{seed}/report"
        report.mkdir(parents=True)
        best = [("rrcm", 0.0, share, 120), ("rrcm", 0.5, share / 2, 120), ("dds", 0.0, 0.2, 40)]
        frame = pd.DataFrame(best, columns=["method", "radius", "certified_accuracy", "images"])
        frame.to_csv(report / "best_sigma.csv", index=False)
        pd.DataFrame({"method": ["rrcm", "dds"], "ratio": [1.0, 11.4 + seed]}).to_csv(
            report / "latency.csv", index=False
        )
    rows = 'tiny,tiny,rrcm,,\n"DDS ({ratio} times), {images} images, {seeds} seeds",tiny,dds,,\nB,,rRCM,rRCM-B,1.0\n'
    (tmp_path / "results/readme.csv").write_text(HEAD + rows)
    markers = BLOCK.pattern.replace("(.*?)", "").replace("\\", "")
    (tmp_path / README).write_text(f"# Title\n\n{markers}\n\nThe end.\n")
    write_readme(tmp_path)
    return tmp_path


def test_rows_come_from_the_published_files(root):
    own, dds, quoted = result_rows(root)
    link = "[results/tiny](results/tiny/seed_0/report/report.md)"
    assert own == ["tiny", "62.5", "", "31.2", "", "", "", "", link, "run here"]  # means over seeds
    assert dds[:2] == ["DDS (12 times), 40 images, 2 seeds", "20.0"]
    assert quoted[:8] == ["B", "52.6", "", "45.6", "", "39.4", "33.8", "27.0"] and quoted[-1] == "not run"
    text = (root / README).read_text()
    assert text.startswith("# Title\n\n<!--") and text.endswith("-->\n\nThe end.\n")
    assert "| tiny | 62.5 | | 31.2 | | | | | [results/tiny]" in text and check_readme(root) == []
    write_readme(root)
    assert (root / README).read_text() == text


def test_three_seeds_have_an_interval(root):
    """t of 2 degrees of freedom is 4.303; the three shares 0.5, 0.75 and 1 have a standard deviation of 0.25."""
    shutil.copytree(root / "results/tiny/seed_1", root / "results/tiny/seed_2")
    path = root / "results/tiny/seed_2/report/best_sigma.csv"
    frame = pd.read_csv(path)
    frame.loc[frame["method"] == "rrcm", "certified_accuracy"] = [1.0, 0.5]
    frame.to_csv(path, index=False)
    assert result_rows(root)[0][1:4] == ["75.0 ± 62.1", "", "37.5 ± 31.1"]


def test_rows_of_one_deployment_come_from_its_table(root):
    """Means over the seeds of a cascade, of one of its sigmas and of the best of them."""
    for seed, share in enumerate((0.5, 0.75)):
        rows = [("rrcm", "cascade", share, 1.2 + seed), ("rrcm", "0.25", 0.25, 1.0), ("rrcm", "best", 1.0, None)]
        rows += [("dds", "cascade", 0.0, 9.0)]
        frame = pd.DataFrame(rows, columns=["method", "deployment", "r_0.5", "samples_ratio"])
        path = root / f"results/tiny/seed_{seed}/report/deployment.csv"
        frame.assign(images=120).to_csv(path, index=False)
    rows = ["one cascade ({samples} times),tiny,rrcm,,cascade", "alone,tiny,rrcm,,0.25", "three,tiny,rrcm,,best"]
    (root / "results/readme.csv").write_text(HEAD + "\n".join(rows) + "\n")
    own, alone, best = result_rows(root)
    assert own[:5] == ["one cascade (1.7 times)", "", "", "62.5", ""] and own[-1] == "run here"
    assert (alone[3], best[3]) == ("25.0", "100.0")
    write_readme(root)
    assert check_readme(root) == []
    for row, message in {
        "x,tiny,rrcm,,0.5": "has no 0.5 of rrcm; use cascade, 0.25, best",
        "x {samples},tiny,rrcm,,best": "knows no 'samples'; use ratio, images or seeds",
        "x {what},tiny,rrcm,,cascade": "knows no 'what'; use ratio, samples, images or seeds",
        "x,tiny,macer,,cascade": "has no method macer",
    }.items():
        (root / "results/readme.csv").write_text(HEAD + row + "\n")
        with pytest.raises(RRCMError, match=re.escape(message)):
            result_rows(root)


@pytest.mark.slow
def test_a_change_of_any_digit_in_the_table_is_found(root):
    text = (root / README).read_text()
    block = BLOCK.search(text)
    places = [block.start(1) + digit.start() for digit in re.finditer(r"\d", block[1])]
    assert len(places) > 30
    for place in places:
        digit = (int(text[place]) + 1) % 10
        (root / README).write_text(f"{text[:place]}{digit}{text[place + 1 :]}")
        (problem,) = check_readme(root)
        assert problem.startswith("README.md, row ") and "column" in problem and str(digit) in problem


def test_a_changed_cell_is_named(root):
    path = root / README
    path.write_text(path.read_text().replace("62.5", "63.5"))
    assert check_readme(root) == ["README.md, row 'tiny', column 'r = 0': has '63.5', published is '62.5'"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("| tiny | 62.5", "| 62.5"), "has 9 cells, must have 10"),
        (lambda text: re.sub(r"\| tiny .*\n", "", text), "has 2 rows, results/readme.csv has 3"),
        (lambda text: re.sub(r"<!-- end.*-->", "", text), "must have one table of results between"),
        (lambda text: text + text, "must have one table of results between"),
    ],
)
def test_a_table_of_another_shape_is_refused(root, change, message):
    (root / README).write_text(change((root / README).read_text()))
    (problem,) = check_readme(root)
    assert message in problem


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("tiny,other,rrcm,,\n", "results/other: no such result; published are tiny"),
        ("tiny,tiny,macer,,\n", "has no method macer"),
        ("B,,rRCM,rRCM-B,7\n", "0 rows of published.csv fit, must be one"),
        ("{what},tiny,rrcm,,\n", "knows no 'what'; use ratio, images or seeds"),
        ("tiny,tiny\n", "line 2: must have the cells label, result, method, model, sigma"),
    ],
)
def test_a_row_without_a_published_result_is_refused(root, rows, message):
    (root / "results/readme.csv").write_text(HEAD + rows)
    with pytest.raises(RRCMError, match=re.escape(message)):
        result_rows(root)
    (problem,) = check_readme(root)
    assert message in problem


def test_results_that_are_not_published_yet_are_listed(root):
    assert missing_results(root) == []
    shutil.rmtree(root / "results/tiny")
    assert missing_results(root) == ["tiny"]


def test_numbers_of_results_are_only_in_the_table():
    """README.md has no numbers of results outside the table, whose cells are checked."""
    text = (REPOSITORY / README).read_text()
    outside = BLOCK.sub("", text[text.index("## Results") : text.index("## Status")])
    assert not re.findall(r"\d+\.\d", outside.replace("make publish", "")) and "|" not in outside


def test_the_table_of_this_repository_is_up_to_date():
    assert check_readme(REPOSITORY) == []
