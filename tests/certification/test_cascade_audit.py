"""`rrcm audit` of a cascade's certificates: honest files are verified on any machine, and forgeries are named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import change_model, files_of
from safetensors.torch import load_file, save_file

from rrcm.certification.audit import audit_file, check_file, find_inputs
from rrcm.certification.cascade import CascadedClassifier
from rrcm.certification.cascade_rules import make_cascade_rule
from rrcm.certification.cascade_states import new_state
from rrcm.certification.cascade_votes import cascade_frame, parse_votes, votes_text
from rrcm.certification.flips import measure_flips
from rrcm.certification.recompute import recompute_frame
from rrcm.certification.record import make_cascade_record, read_record, record_bytes, record_path
from rrcm.certification.results import certificate_tables
from rrcm.certification.revote import Settings
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.load import load_cascade
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, sha256_file, sha256_folder, write_json
from rrcm.utils.pixels import to_unit_range

NAME, JOINT = "certificates/rrcm/cascade.tsv", "models/rrcm/joint"
SIGMAS, THRESHOLDS = (0.1, 0.25, 0.5), (0.02, -0.05)
EXPERTS = [f"models/rrcm/sigma_{sigma}" for sigma in SIGMAS]
RULE = {"stopping": "sequential", "n0": 50, "n": 400, "alpha": 0.01, "radius_step": 0.05, "bound": "margin"}


def write_result(root: Path, trained: Path, models: list[str]) -> None:
    """A published result whose cascade is certified for 18 images of the test split."""
    for model in models:
        shutil.copytree(trained / "models/rrcm/sigma_0.5", root / model)
        if model == JOINT:
            change_model(root / model, joint={"sigmas": list(SIGMAS), "interval": None}, sigma=..., t=...)
        else:
            sigma = float(model.rpartition("_")[2])
            change_model(root / model, sigma=sigma, t=2 * sigma)
    shutil.copytree(trained / "data/shards", root / "shards")
    scales, _, _ = load_cascade([root / model for model in models], SIGMAS)
    cascade = CascadedClassifier([each.classifier for each in scales], SIGMAS, THRESHOLDS, 10, seed=3, batch_size=200)
    split = ShardedDataset(root / "shards", "test")
    pixels, labels, indices = read_split(split, 8, 20)
    rule = make_cascade_rule(sigmas=SIGMAS, thresholds=THRESHOLDS, **RULE)
    columns = zip(indices, to_unit_range(pixels), labels.tolist(), strict=True)
    states = [new_state(*each, rule) for each in columns]
    for _ in cascade.certify_stream(states, rule):
        pass
    tables = certificate_tables(root / NAME, cascade_frame(states, rule, 10))
    record = make_cascade_record(
        cascade,
        200,
        tables,
        models=[{"kind": "classifier", "sha256": sha256_folder(root / model)} for model in models],
        data={"sha256": split.fingerprint, "split": "test", "every": 20, "max_images": [None, None]},
        image_size=8,
        labelled=True,
        compile=False,
        certificates="label-aware",
        **RULE,
    )
    (root / NAME).parent.mkdir(parents=True)
    for path, content in (tables | {record_path(root / NAME): record_bytes(record)}).items():
        path.write_bytes(content)


@pytest.fixture(scope="module")
def honest(trained: Path, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("cascade")
    write_result(root, trained, [JOINT])
    return root


@pytest.fixture
def result(honest: Path, tmp_path: Path) -> Path:
    """A published result, which a test may forge."""
    torch.set_num_threads(1)
    return shutil.copytree(honest, tmp_path / "result")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrcm.certification.audit.SAMPLES_HERE", 1000)


def audit(result: Path, **options: object):
    return audit_file(result / NAME, *find_inputs(result / NAME, None, None), **options)


def seal(result: Path, **entries: object) -> None:
    """Make the hashes in the record fit the tables, and change other entries."""
    path = result / NAME
    record = read_json(record_path(path))
    files = {name: sha256_file(path.with_name(name)) for name in record["files"]}
    write_json(record_path(path), record | {"files": files} | entries)


def forge(result: Path, change: Callable[[pd.DataFrame], pd.DataFrame], *, follow: bool = True) -> None:
    """Change the tables, and with `follow` let all columns follow from the votes. The record is made to fit."""
    record, frame, problems = check_file(result / NAME)
    assert not problems
    frame = change(frame)
    if follow:
        frame = recompute_frame(frame, record)
    for file, content in certificate_tables(result / NAME, frame).items():
        file.write_bytes(content)
    seal(result)


@pytest.mark.parametrize("models", [[JOINT], EXPERTS], ids=["joint", "experts"])
def test_an_honest_file_is_verified_vote_by_vote(trained: Path, tmp_path: Path, models: list[str]):
    torch.set_num_threads(1)
    write_result(tmp_path, trained, models)
    assert find_inputs(tmp_path / NAME, None, None) == ([str(tmp_path / each) for each in models], tmp_path / "shards")
    before, (_, frame, _) = files_of(tmp_path), check_file(tmp_path / NAME)
    assert (frame["radius"] > 0).any() and frame["selection"].str.contains("0.1=").any()
    outcome = audit(tmp_path, rows=9, seed=1)
    assert not outcome.problems and outcome.exact and (outcome.rows, outcome.audited) == (18, 9)
    assert files_of(tmp_path) == before


OTHERWISE = {
    "bfloat16": Settings(precision="bf16"),
    "batches": Settings(batch_size=100),
    "threads": Settings(threads=2),
}


@pytest.mark.thorough
@pytest.mark.parametrize("settings", OTHERWISE.values(), ids=OTHERWISE)
def test_an_honest_file_is_verified_with_other_rounding(result: Path, settings: Settings):
    outcome = audit(result, settings=settings)
    assert not outcome.problems and outcome.audited == 18 and not outcome.exact
    assert outcome.samples > 1000 and 0 < outcome.power < 1 and "it was measured here" in outcome.notes[0]


def raise_votes(frame: pd.DataFrame) -> pd.DataFrame:
    """All votes since the look before the last become votes for the class, in the row with the smallest radius."""
    rows = frame[(frame["predict"] >= 0) & (frame["stop_reason"] == "all samples")]
    row = rows.iloc[rows["radius"].argmin()]
    looks, top = parse_votes(row["votes"], SIGMAS), str(row["predict"])
    last, drawn, _ = looks[-1]
    before = [votes for scale, earlier, votes in looks if scale == last and earlier < drawn]
    before = before[-1] if before else {}
    looks[-1][2] = before | {top: before.get(top, 0) + drawn - sum(before.values())}
    frame.loc[row.name, "votes"] = votes_text(looks, SIGMAS)
    return frame


def test_raised_radii_are_named(result: Path):
    path = result / NAME
    certified = check_file(path)[1].query("radius > 0").iloc[0]
    forge(result, lambda frame: frame.assign(radius=frame["radius"] + 0.05 * (frame["radius"] > 0)), follow=False)
    problems = audit(result).problems
    assert problems[0].startswith(f"{path}: image {certified['idx']}: radius is ") and "its votes give" in problems[0]


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("path", lambda cell: cell.replace("0.5 ", "0.25 ")),
        ("samples_by_sigma", lambda cell: cell.replace("0.5=", "0.5=1")),
        ("samples", lambda cell: cell - 1),
    ],
)
def test_columns_that_do_not_follow_are_named(result: Path, column: str, change: Callable):
    frame = check_file(result / NAME)[1]
    row = frame.query("radius > 0").index[0]
    changed = frame.astype({column: object})
    changed.loc[row, column] = change(frame.loc[row, column])
    if column == "predict":
        changed.loc[row, "correct"] = 1 - changed.loc[row, "correct"]
        changed["label"] = (
            frame["label"].where(frame.index != row, changed["predict"]).where(changed["correct"] == 1, frame["label"])
        )
    forge(result, lambda _: changed, follow=False)
    problems = audit(result).problems
    assert any(f"image {frame.loc[row, 'idx']}: {column} is " in problem for problem in problems)


@pytest.mark.parametrize("settings", [Settings(), Settings(batch_size=100)])
def test_votes_that_were_changed_with_all_that_follows_are_found(result: Path, settings: Settings):
    forge(result, raise_votes)
    assert not check_file(result / NAME)[2]
    problems = [problem for problem in audit(result, settings=settings).problems if "image" in problem]
    assert problems and all("votes at sigma 0." in problem and "differ when counted" in problem for problem in problems)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"thresholds": [-0.02, -0.2]}, "image "),
        ({"sigmas": [0.1, 0.25, 0.6]}, "must be votes of some sigmas by class"),
        ({"certificates": "multi-scale"}, "image "),
        ({"alpha": 0.2}, "image "),
        ({"seed": 4}, "differ when counted again"),
        ({"can_pass": True}, "can_pass is True, by the model it is False"),
    ],
)
def test_a_record_of_another_cascade_is_found(result: Path, entries: dict, problem: str):
    seal(result, **entries)
    problems = audit(result).problems
    assert problems and any(problem in each for each in problems)


def change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("head.weight"))
    save_file(tensors | {name: tensors[name].roll(1, 0)}, path)
    change_model(folder)


def test_another_model_is_found(result: Path):
    change_weights(result / JOINT)
    assert audit(result).problems == [f"{result / JOINT}: is not the model that was certified"]
    seal(result, models=[{"kind": "classifier", "sha256": sha256_folder(result / JOINT)}])
    for settings in (Settings(), Settings(batch_size=100)):
        problems = audit(result, rows=9, settings=settings).problems
        assert problems and all("differ when counted again" in p or "more lines" in p for p in problems)


def test_swapped_and_missing_experts_are_found(trained: Path, tmp_path: Path):
    write_result(tmp_path, trained, EXPERTS)
    change_weights(tmp_path / EXPERTS[1])
    assert audit(tmp_path).problems == [f"{tmp_path / EXPERTS[1]}: is not the model that was certified"]
    with pytest.raises(RRCMError, match=r"cascade.tsv: was certified with 3 models, 2 are given; give each$"):
        audit_file(tmp_path / NAME, [tmp_path / each for each in EXPERTS[:2]], tmp_path / "shards")
    shutil.rmtree(tmp_path / EXPERTS[2])
    with pytest.raises(RRCMError, match=r"models/rrcm/sigma_0.5: no such folder, where the model of .*; give --model$"):
        find_inputs(tmp_path / NAME, None, None)


@pytest.mark.thorough
def test_a_published_flip_rate_is_measured_and_checked(result: Path):
    path = result / NAME
    flips = measure_flips(path, [result / JOINT], result / "shards", samples=1000, device="cpu")
    against = [each.against for each in flips["fp32"]]
    assert against[:3] == [f"batch 100, 2 threads, sigma {sigma}" for sigma in SIGMAS] and len(against) == 6
    record = read_record(record_path(path)).model_copy(update={"flips": flips})
    record_path(path).write_bytes(record_bytes(record))
    outcome = audit(result, settings=Settings(batch_size=100))
    assert not outcome.problems and not outcome.notes
