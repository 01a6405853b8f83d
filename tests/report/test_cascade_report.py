"""The report of a run with cascades: its tables and metrics, and files that are missing, damaged or exchanged."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from invented_run import CASCADE, cascade_config, make_cascade, make_config, make_report, render, write_report

from rrcm.certification.results import read_certificates, read_samples
from rrcm.config import Config
from rrcm.data.shards import ShardedDataset
from rrcm.evaluation.metrics import average_certified_radius, certified_accuracy
from rrcm.report.build import make_tables
from rrcm.report.cascade_inputs import cascade_files, read_cascades
from rrcm.report.inputs import read_inputs
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, write_json

JOINT = "certificates/rrcm_joint"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Config, Path]:
    """Settings and the folder of an invented run with two cascades, and its report; tests change only copies."""
    return make_report(cascade_config(), tmp_path_factory.mktemp("cascades"))


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run[1], tmp_path / "copy"))


def test_the_tables_agree_with_the_certificates(run):
    config, root = run
    table = pd.read_csv(root / "reports/digits/deployment.csv").set_index(["method", "deployment"])
    metrics = json.loads((root / "metrics.json").read_text())
    for method in config.cascade.methods:
        for file, row in (("cascade", "cascade"), ("multi_scale", "multi-scale"), ("sigma_0.5", "0.5")):
            path = root / f"certificates/{method}/{file}.tsv"
            frame, samples = read_certificates(path), read_samples(path.with_suffix(".samples.tsv"))
            shares = certified_accuracy(frame, config.report.radii).tolist()
            columns = [f"r_{radius:g}" for radius in config.report.radii]
            assert table.loc[(method, row), columns].tolist() == pytest.approx(shares, abs=1e-6)
            assert table.loc[(method, row), "acr"] == pytest.approx(average_certified_radius(frame), abs=1e-6)
            assert table.loc[(method, row), "samples"] == pytest.approx(samples["samples"].mean(), abs=1e-6)
            key = file.replace(".", "_")
            assert metrics["acr"][method][key] == pytest.approx(average_certified_radius(frame), abs=1e-6)
            assert metrics["certified_r_0_5"][method][key] == pytest.approx(shares[2], abs=1e-6)
    differences = pd.read_csv(root / "reports/digits/deployment_differences.csv")
    accuracy = differences[differences["measure"] == "certified_accuracy"].set_index(["method", "at"])
    for (method, radius), row in accuracy.iterrows():
        best = table.loc[(method, "best"), f"r_{radius:g}"]
        assert row["difference"] == pytest.approx(row["value"] - best, abs=2e-6)
    accepted = pd.read_csv(root / "reports/digits/acceptance.csv")
    shares = accepted[["accepts_0.25", "accepts_0.5", "accepts_1", "nothing_certified"]]
    assert shares.sum(axis=1).tolist() == pytest.approx([1, 1], abs=1e-5) and accepted["networks"].tolist() == [1, 3]


def test_the_report_says_what_is_compared(run):
    config, root = run
    text = (root / "reports/digits/report.md").read_text()
    section = text.split("## One deployment")[1].split("## Figures")[0]
    assert "\n\n\n" not in text and "ACR by the binary bound" in section
    assert section.count("at no radius is the cascade more than") == 2 and "three deployments" in section
    assert "By the margin bound, the single σ certify" in section and "Cascades have no rows here" in section
    assert "![deployment](deployment.png)" in text and text.index("deployment.png") < text.index("envelope.png")
    assert "### Joint networks and their experts" in text and "cascade:\n  methods:" in text
    for file in cascade_files(config, "rrcm_joint"):
        assert f"  {file}\n" in text


def test_joint_networks_are_compared_with_their_own_experts(run):
    _, root = run
    joint = pd.read_csv(root / "reports/digits/joint.csv")
    table = pd.read_csv(root / "reports/digits/per_sigma.csv").set_index(["method", "sigma"])
    assert set(joint["method"]) == {"rrcm_joint"}
    for row in joint[joint["measure"] == "acr"].itertuples():
        assert row.value == pytest.approx(table.loc[("rrcm_joint", row.at), "acr"], abs=1e-6)
        assert row.difference == pytest.approx(row.value - table.loc[("rrcm", row.at), "acr"], abs=2e-6)


@pytest.mark.thorough
def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    config, root = run
    write_report(config, root, tmp_path / "again")
    for path in (root / "reports/digits").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_without_cascades_a_report_has_no_trace_of_them(run):
    """Also the settings of cascades that there are not."""
    config, root = run
    pages = []
    for cascade in (CASCADE, CASCADE | {"choose_n": 7}):
        without = make_config([], cascade=cascade, methods=config.methods, sigmas=config.sigmas)
        inputs = read_inputs(without, root)
        pages.append(render(without, root, inputs, ["0"]))
        assert inputs.cascades == {}
    assert not [name for name in make_tables(without, inputs) if "deployment" in name]
    assert pages[0] == pages[1] and "cascade" not in pages[0].lower()


def test_pass_votes_are_counted_where_a_sigma_was_asked(run, copy):
    config, _ = run
    labels = ShardedDataset(copy / "data/shards", "test").labels
    make_cascade(config, copy, "rrcm_joint", labels, can_pass=True)
    inputs = read_inputs(config, copy)
    passed = inputs.cascades["rrcm_joint"].passed
    votes = read_samples(copy / f"{JOINT}/cascade.samples.tsv")["selection"]
    cells = [part for text in votes for part in text.split(" ") if part.startswith("1.0=")]
    by_hand = [sum(int(c.split(":")[1]) for c in cell[4:].split(",") if c.startswith("10:")) for cell in cells]
    assert passed[1.0] == pytest.approx(sum(by_hand) / (100 * len(votes))) and 0 < passed[0.5] < 1
    text = render(config, copy, inputs, ["0"])
    assert "| pass at σ = 1 |" in " ".join(text.split()) and 'votes for "pass"' in text
    assert text.count('loses votes to "pass"') == 1  # the cascade of the experts cannot pass


def test_a_missing_file_names_the_stage(run, copy):
    config, _ = run
    for file in cascade_files(config, "rrcm_joint"):
        (copy / file).rename(copy / "away")
        with pytest.raises(RRCMError, match=r"no such file; run `dvc repro certify-cascade@rrcm_joint`") as caught:
            read_inputs(config, copy)
        assert file in str(caught.value) and "\n" not in str(caught.value)
        (copy / "away").rename(copy / file)


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    """A change of the first `old` in a file of the joint cascade."""

    def change(root: Path) -> None:
        path = root / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def put(file: str = "cascade", **entries: object) -> Callable[[Path], None]:
    """A change of entries of a record."""

    def change(root: Path) -> None:
        path = root / f"{JOINT}/{file}.json"
        write_json(path, read_json(path) | entries)

    return change


def exchange(*names: str, other: str = f"{JOINT}/multi_scale") -> Callable[[Path], None]:
    """Exchange the cascade's files that have these ends with those of `other`."""

    def change(root: Path) -> None:
        for end in names:
            one, two = root / f"{JOINT}/cascade{end}", root / f"{other}{end}"
            one.rename(root / "away")
            two.rename(one)
            (root / "away").rename(two)

    return change


def rewrite(column: str) -> Callable[[Path], None]:
    """Certificates of other images or labels, whose record and timing fit."""

    def change(root: Path) -> None:
        path = root / f"{JOINT}/cascade.tsv"
        record = read_json(path.with_suffix(".json"))
        for file in (path, path.with_suffix(".samples.tsv")):
            frame = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
            if column in frame:
                frame[column] = [
                    str((int(value) + 1) % 10 if column == "label" else int(value) + 1) for value in frame[column]
                ]
            if "correct" in frame:
                frame["correct"] = (frame["label"] == frame["predict"]).astype(int)
            file.write_text(frame.to_csv(sep="\t", index=False, lineterminator="\n"))
            record["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        write_json(path.with_suffix(".json"), record)

    return change


def single_record(root: Path) -> None:
    record = read_json(root / f"{JOINT}/cascade.json")
    for name in ("sigmas", "thresholds", "certificates", "can_pass", "chosen"):
        record.pop(name)
    (model,) = record.pop("models")
    write_json(root / f"{JOINT}/cascade.json", record | {"model": model, "sigma": 1.0})


TIMING = "timings/certify_cascade/rrcm_joint.json"
ALL = (".tsv", ".samples.tsv", ".json")
DAMAGED = {  # change, what is said
    "a radius": (edit(f"{JOINT}/cascade.tsv", "0.1", "0.9"), "cascade.tsv: is not the file that the record"),
    "votes": (edit(f"{JOINT}/cascade.samples.tsv", ":97", ":98"), "samples.tsv: is not the file that the record"),
    "all three files of the published rule": (exchange(*ALL), "certificates differs from the settings"),
    "the tables of the published rule": (exchange(*ALL[:2]), "is not the file that the record beside it describes"),
    "the cascade of the experts": (exchange(*ALL, other="certificates/rrcm/cascade"), "has 3 base classifiers"),
    "no JSON": (edit(f"{JOINT}/cascade.json", "{", ""), "cascade.json"),
    "a record without sigmas": (put(sigmas=[]), "cascade.json: "),
    "a single sigma's record": (single_record, "is the record of a single sigma, not of a cascade"),
    "the other bound": (put(bound="margin"), "bound differs from the settings"),
    "more samples": (put(n=5000), "n differs from the settings"),
    "another seed": (put(seed=1), "seed differs from the settings"),
    "other sigmas": (put(sigmas=[0.25, 0.5, 2.0]), "sigmas differs from the settings"),
    "given thresholds": (put(chosen=None), "its thresholds were not chosen as the settings say"),
    "another choice": (
        put(chosen={"by": {"0.5": 1.0}, "n": 1000, "images": 143, "score": 0.5}),
        "its thresholds were not chosen as the settings say",
    ),
    "another classifier by the published rule": (
        put("multi_scale", thresholds=[0.0, 0.3]),
        "multi_scale.json: has other thresholds than the cascade beside it",
    ),
    "other images": (rewrite("idx"), "cascade.tsv: certifies other images than the certificates of single sigmas"),
    "other labels": (rewrite("label"), "cascade.tsv: has other labels than the certificates of single sigmas"),
    "another time": (edit(TIMING, '"seconds": 2.5', '"seconds": 2.6'), "is not the sum of seconds_by_image"),
    "other samples": (edit(TIMING, '"samples": ', '"samples": 1'), "another sum of samples"),
    "no time of the published rule": (edit(TIMING, '"multi_scale"', '"other"'), "has no multi_scale"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_and_exchanged_files_are_refused_with_the_stage(run, copy, case: str):
    config, _ = run
    change, expected = DAMAGED[case]
    change(copy)
    with pytest.raises(RRCMError) as caught:
        read_inputs(config, copy)
    message = str(caught.value)
    assert expected in message and "`dvc repro certify-cascade@rrcm_joint`" in message and "\n" not in message


def test_given_thresholds_must_be_those_of_the_record(run, copy):
    config, _ = run
    given = cascade_config(cascade=CASCADE | {"methods": ["rrcm_joint"], "thresholds": [0.05, 0.1]})
    inputs = read_inputs(config, copy)
    for name in ("cascade", "multi_scale"):
        put(name, chosen=None)(copy)
    assert read_cascades(given, copy, inputs.certificates, 10)["rrcm_joint"].record.chosen is None
    put(thresholds=[0.05, 0.2])(copy)
    with pytest.raises(RRCMError, match="thresholds differs from the settings"):
        read_cascades(given, copy, inputs.certificates, 10)
