"""A board puts files of the same images into one table each, and refuses lists and files that contradict each other."""

import gzip
import json
import shutil
from contextlib import ExitStack
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY

from rrcm.evaluation.metrics import average_certified_radius, certified_accuracy, wilson_interval
from rrcm.publication.objects import find_file
from rrcm.report.board import make_board
from rrcm.report.board_entries import RADII, read_board, schema
from rrcm.report.board_files import read_deployed
from rrcm.report.board_rows import Group, group_rows
from rrcm.utils.errors import RRCMError

LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def write_file(path: Path, radius: float, labels: list[int] = LABELS, wrong: int = 0) -> pd.DataFrame:
    """A file where each image is certified with a larger radius than the one before, but for the first `wrong`."""
    rows = [(i, y, -1 if i < wrong else y, 0.0 if i < wrong else radius + i / 10) for i, y in enumerate(labels)]
    frame = pd.DataFrame(rows, columns=["idx", "label", "predict", "radius"])
    frame = frame.assign(correct=(frame["label"] == frame["predict"]).astype(int), time=0.5)
    text = frame.to_csv(sep="\t", index=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return frame


def entry(name: str, **changes: object) -> dict:
    """An entry with two sigmas, whose files lie in the folder of its name."""
    return {
        "name": name,
        "data": "digits",
        "n": 1000,
        "n0": 100,
        "alpha": 0.001,
        "files": {0.25: f"{name}/0.25.tsv.gz", 1: f"{name}/1.tsv"},
    } | changes


def write_list(folder: Path, *entries: dict, **changes: object) -> Path:
    path = folder / "board.yaml"
    path.write_text(yaml.safe_dump({"title": "Mine", "radii": [0, 0.5, 5, 9], "entries": list(entries)} | changes))
    return path


def read(path: Path) -> list[Group]:
    board = read_board(path)
    return group_rows(read_deployed(board, path.parent, lambda file: file), board.radii)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A list with two methods: the first has a larger radius at sigma 1, but fewer images that it certifies there."""
    for name, radius in (("low", 0.1), ("high", 0.3)):
        write_file(tmp_path / name / "0.25.tsv.gz", radius)
        write_file(tmp_path / name / "1.tsv", 5 * radius, wrong=3)
    return write_list(tmp_path, entry("low"), entry("high", paper="https://example.org/a", network="LeNet"))


def test_the_rows_have_the_numbers_of_their_files_sorted_by_acr(two: Path):
    (group,) = read(two)
    assert group.radii == [0, 0.5] and group.images == [10]  # nobody is certified at 5
    names = [(row.entry.name, row.deployed[0].name) for row in group.single]
    assert names == [("high", "1"), ("low", "1"), ("high", "0.25"), ("low", "0.25")]
    frame = write_file(two.parent / "again.tsv", 1.5, wrong=3)
    shares = certified_accuracy(frame, [0, 0.5])
    assert [share.value for share in group.single[0].shares] == shares.tolist() == [0.7, 0.7]
    assert group.single[0].shares[1] == pytest.approx((0.7, *wilson_interval(shares[1], 10)))
    assert group.single[0].acr.value == pytest.approx(average_certified_radius(frame))


def test_the_best_sigma_is_chosen_at_each_radius(two: Path):
    (group,) = read(two)
    first = group.best[1]
    assert first.entry.name == "low" and [each.name for each in first.chosen] == ["0.25", "1"]
    assert [share.value for share in first.shares] == pytest.approx([1.0, 0.7])
    assert first.acr == max(row.acr for row in group.single if row.entry.name == "low")


def test_the_page_and_the_table_have_every_row(two: Path, tmp_path: Path):
    make_board(two, tmp_path / "out/a.html", lambda file: file)
    table = pd.read_csv(tmp_path / "out/a.csv")
    assert table["deployed"].tolist() == ["1", "1", "0.25", "0.25", "best", "best"]
    assert (table["seconds"].head(4) == 0.5).all() and (table["samples"].head(4) == 1100).all()
    assert table.loc[0, "files"] == "high/1.tsv" and len(table.loc[4, "sha256"].split()) == 2
    assert {"r_0.5", "r_0.5_low", "r_0.5_high", "acr", "alpha", "bound", "images"} <= set(table)
    page = (tmp_path / "out/a.html").read_text()
    first = page
    make_board(two, tmp_path / "out/a.html", lambda file: file)
    assert (tmp_path / "out/a.html").read_text() == first
    for text in ("70.0<small> (39.7 to 89.2)", '<a href="../high/1.tsv">', '<a href="https://example.org/a">paper'):
        assert text in page
    assert HTMLParser().feed(page) is None and "src=" not in page.replace("img-src", "")


def test_names_are_shown_literally(two: Path, tmp_path: Path):
    evil = "<script>alert(1)</script>"
    write_list(tmp_path, entry("low"), entry("high") | {"name": evil, "data": "digits"}, title=f"{evil} \u202e")
    make_board(two, tmp_path / "a.html", lambda file: file)
    page = (tmp_path / "a.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "\u202e" not in page


def test_entries_of_other_data_have_a_table_of_their_own(two: Path, tmp_path: Path):
    write_file(tmp_path / "far/0.25.tsv.gz", 0.1, LABELS[::-1])
    write_file(tmp_path / "far/1.tsv", 0.1, LABELS[::-1])
    far = entry("far")
    groups = read(write_list(tmp_path, entry("low"), far | {"data": "letters"}, entry("high")))
    assert [(group.data, len(group.single)) for group in groups] == [("digits", 4), ("letters", 2)]
    with pytest.raises(RRCMError, match=r"'low, σ = 0.25 .* and 'far, .* have two labels"):
        read(write_list(tmp_path, entry("low"), far))


def test_training_runs_are_averaged(two: Path, tmp_path: Path):
    for run, radius in enumerate((0.0, 0.1, 0.2)):
        write_file(tmp_path / f"seed_{run}/a.tsv", radius, wrong=run)
    runs = entry("mine", files={"cascade": "a.tsv"}, runs=["seed_0", "seed_1", "seed_2"])
    (row,) = read(write_list(tmp_path, runs))[0].single
    assert row.shares[0].value == pytest.approx(0.9) and row.deployed[0].label == "cascade"
    assert row.shares[0].low < wilson_interval(pd.Series([0.9]), 10)[0][0] and row.shares[0].high == 1
    write_file(tmp_path / "seed_2/a.tsv", 0.2, LABELS[:-1])
    with pytest.raises(RRCMError, match=r"seed_2/a.tsv: has other images than .*seed_0/a.tsv; list runs on the same"):
        read(write_list(tmp_path, runs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alhpa": 0.1}, r"entries.0.alhpa: unknown key; did you mean alpha\? \(entry 1, 'low'\)"),
        ({"alpha": 2}, "entries.0.alpha = 2: should be less than 1"),
        ({"n": "many"}, "entries.0.n = 'many'"),
        ({"paper": "javascript:alert(1)"}, "entries.0.paper = 'javascript:alert"),
        ({"files": {}}, "entries.0.files"),
        ({"files": {"big": "a.tsv"}}, "entries.0.files"),
        ({"files": {1: "a.tsv", "1": "b.tsv"}}, "entries.0.files.*has one sigma twice"),
        ({"threat": "Linf"}, "entries.0.threat = 'Linf'"),
        ({"name": "high"}, "two entries of 'digits' have the name 'high'; rename one"),
        ({"alpha": None}, "low/0.25.tsv.gz: has no record of its certification; give alpha in the entry 'low'"),
        ({"files": {1: "none.tsv"}}, "none.tsv: no such file"),
    ],
)
def test_bad_entries_are_refused_in_one_line(two: Path, change: dict, message: str):
    with pytest.raises(RRCMError, match=message) as caught:
        read(write_list(two.parent, entry("low") | change, entry("high")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "title: [", "title: a", '{"title": "a", "entries": []}', "\x00"])
def test_other_files_are_no_list(tmp_path: Path, text: str):
    path = tmp_path / "board.json"
    path.write_text(text)
    with pytest.raises(RRCMError, match=r"board\.json: ") as caught:
        read_board(path)
    assert "\n" not in str(caught.value)


def test_json_is_read_like_yaml(two: Path):
    values = yaml.safe_load(two.read_text())
    path = two.with_suffix(".json")
    path.write_text(json.dumps(values))  # its keys are texts
    assert read_board(path) == read_board(two)


def test_the_schema_in_the_package_is_that_of_the_model():
    kept = json.loads((files("rrcm.report") / "board.schema.json").read_text())
    assert kept == schema(), "run `python -m rrcm.report.board_entries > rrcm/report/board.schema.json`"


def test_the_command_refuses_other_outputs(two: Path, capsys: pytest.CaptureFixture):
    from rrcm.cli import app

    with pytest.raises(SystemExit):
        app(["board", str(two), "--output", "board.pdf"])
    assert capsys.readouterr().err == "error: --output board.pdf: must end in .html\n"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates and timings of one method of a published run, as files, in the folder of a list."""
    board, folder = read_board(REPOSITORY / "results/board.yaml"), tmp_path_factory.mktemp("published")
    listed = next(each for each in board.entries if each.name == "rRCM, joint")
    run = REPOSITORY / "results" / listed.runs[0]
    with ExitStack() as stack:
        found = find_file(run / listed.files["1"], stack, {})
        for name in ("certificates/rrcm_joint", "timings/certify/rrcm_joint"):
            shutil.copytree(found.parents[2] / name, folder / name)
    return folder


def test_the_list_of_others_files_is_valid():
    board = read_board(REPOSITORY / "results/board_fashion_mnist.yaml")
    assert len({path for each in board.entries for path in each.files.values()}) == 21


def test_every_file_of_our_list_is_published():
    """In the folders of the runs or in DVC's objects, which are opened without DVC."""
    board = read_board(REPOSITORY / "results/board.yaml")
    with ExitStack() as stack:
        opened: dict[Path, Path] = {}
        for each in board.entries:
            for run in each.runs:
                for file in each.files.values():
                    assert find_file(REPOSITORY / "results" / run / file, stack, opened).is_file()
            assert each.report is None or (REPOSITORY / "results" / each.report).is_file()


def ours(folder: Path, **changes: object) -> Path:
    files = {"files": {1: "certificates/rrcm_joint/sigma_1.0.tsv"}} | changes
    return write_list(folder, {"name": "rRCM, joint", "data": "digits"} | files, radii=RADII)


def test_our_records_tell_how_a_file_was_certified(published: Path):
    ((row,),) = (group.single for group in read(ours(published)))
    table = pd.read_csv(REPOSITORY / "results/digits/seed_0/report/per_sigma.csv").set_index(["method", "sigma"])
    expected, (file,) = table.loc["rrcm_joint", 1.0], row.deployed[0].files
    found = [row.acr.value, row.shares[0].value, file.samples]
    assert found == pytest.approx(expected[["acr", "r_0", "samples"]].tolist(), abs=1e-6)
    assert file.settings == {"n": 1000, "n0": 100, "alpha": 0.001, "bound": "binary", "stopping": "sequential"}
    assert 0 < file.seconds < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.01}, "the entry says alpha 0.01, its record 0.001; correct the entry"),
        ({"files": {0.5: "certificates/rrcm_joint/sigma_1.0.tsv"}}, "is listed as 0.5, but its record says 1;"),
        ({"files": {1: "certificates/rrcm_joint/cascade.tsv"}}, "is listed as 1, but its record says cascade;"),
    ],
)
def test_entries_that_contradict_a_record_are_refused(published: Path, changes: dict, message: str):
    with pytest.raises(RRCMError, match=message):
        read(ours(published, **changes))


def test_a_changed_file_is_refused(published: Path, tmp_path: Path):
    shutil.copytree(published, tmp_path / "copy")
    path = tmp_path / "copy/certificates/rrcm_joint/sigma_1.0.tsv"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(RRCMError, match=r"sigma_1\.0\.tsv is not the file that the record beside it describes"):
        read(ours(tmp_path / "copy"))
