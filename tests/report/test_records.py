"""Every input of the report is checked, and impossible contents are refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from invented_run import make_config, make_inputs

from rrcm.config import Config
from rrcm.report.inputs import read_inputs
from rrcm.report.records import Environment, check_finetuning, is_share, read_numbers
from rrcm.utils.errors import RRCMError
from rrcm.utils.provenance import describe_environment


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config, root = make_config(external=[], methods=["rrcm", "consistency"]), tmp_path_factory.mktemp("sources")
    make_inputs(config, root)
    return config, root


def set_key(path: str, value: object) -> Callable[[str], str]:
    """A function that sets the value under a dotted path in a JSON text."""

    def change(text: str) -> str:
        content = json.loads(text)
        *outer, last = path.split(".")
        inner = content
        for key in outer:
            inner = inner[key]
        inner[last] = value
        return json.dumps(content)

    return change


def put(old: str, new: str) -> Callable[[str], str]:
    return lambda text: re.sub(old, new, text, count=1, flags=re.M)


CERTIFICATES, SAMPLES = "certificates/rrcm/sigma_0.25.tsv", "certificates/rrcm/sigma_0.25.samples.tsv"
MODEL, HISTORY = "models/rrcm/sigma_0.25/config.json", "models/rrcm/sigma_0.25/history.csv"
ENCODER, STEPS = "models/pretrain/rrcm/config.json", "models/pretrain/rrcm/history.csv"
REPRESENTATION, LATENCY = "models/pretrain/rrcm/representation.csv", "timings/latency.json"
CERTIFY, FINETUNE = "timings/certify/rrcm/sigma_0.25.json", "timings/finetune/rrcm/sigma_0.25.json"

DAMAGED = {  # file, change of its text, what is said
    "a blank in a number": (CERTIFICATES, put(r"^0\t0", "0 \t0"), "line 2: '0 ' is not as it was written"),
    "1_0 in a number": (SAMPLES, put(r"\t1100\t", "\t1_100\t"), "'1_100' is not as it was written"),
    "too many samples": (
        SAMPLES,
        put(r"1100\tall samples\t1100", "9100\tall samples\t9100"),
        "samples 9100: must be n0",
    ),
    "a radius off the grid": (SAMPLES, put(r"(\t0\.\d\d)(\t[\d: ]+\t)$", r"\g<1>5\g<2>"), "is no radius of the grid"),
    "a selection without votes": (SAMPLES, put(r"\t[\d: ]+\t$", "\t3:0\t"), "selection '3:0': must be votes by class"),
    "one sample less in the sum": (CERTIFY, set_key("samples", 5), "another sum of samples"),
    "images of another run": (CERTIFY, set_key("seconds_by_image.1", 0.1), "has other images"),
    "seconds that do not add up": (CERTIFY, set_key("seconds", 1.7), "is not the sum of seconds_by_image"),
    "negative seconds": (FINETUNE, set_key("seconds", -1.5), "seconds: Input should be greater than or equal to 0"),
    "seconds as text": (FINETUNE, set_key("seconds", "1.5"), "seconds: Input should be a valid number"),
    "no number": (FINETUNE, put("1.5", "NaN"), "seconds: Input should be a finite number"),
    "another key": (FINETUNE, put('"seconds"', '"secondz"'), "seconds: Field required"),
    "no record": (FINETUNE, lambda text: "[1]", "Input should be a valid dictionary"),
    "no environment": (FINETUNE, set_key("environment", {}), "environment.git: Field required"),
    "half a revision": (FINETUNE, set_key("environment.git.revision", "0" * 39), "environment.git.revision: String"),
    "a version of letters": (FINETUNE, set_key("environment.software.python", "x.12"), "software.python: String"),
    "another key of a machine": (FINETUNE, put('"cpu"', '"gpu"'), "environment.hardware.cpu: Field required"),
    "another method": (MODEL, set_key("method", "dds"), "method differs from the settings and shards"),
    "another seed": (MODEL, set_key("seed", 3), "seed differs from the settings"),
    "other classes": (MODEL, set_key("class_names", ["cat"]), "class_names differs from"),
    "another share": (MODEL.replace("0.25", "1.0"), set_key("compute.pretrain_share", 5.0), "is another than"),
    "infinite compute": (
        MODEL,
        put(r'"finetune": [\d.]+', '"finetune": Infinity'),
        "compute.finetune: Input should be",
    ),
    "another best epoch": (MODEL, set_key("selected.epoch", 3), "the best epoch is 19 with"),
    "another best accuracy": (MODEL, set_key("selected.val_accuracy", 0.5), "the best epoch is 19 with"),
    "other epochs": (MODEL, set_key("training.epochs", 21), "epochs must be 1, 2, ... to 21"),
    "rows out of order": (HISTORY, put(r"^(2,.*\n)(3,.*\n)", r"\2\1"), "epochs must be 1, 2, ... to 20"),
    "a row twice": (HISTORY, put(r"^(2,.*\n)", r"\1\1"), "epochs must be 1, 2,"),
    "a row less": (HISTORY, put(r"^2,.*\n", ""), "epochs must be 1, 2,"),
    "a NUL byte": (HISTORY, put(r"^2,", "2\0,"), "has the character '\\x00'"),
    "a letter": (HISTORY, put(r"^2,1", "2,l"), "line 3: loss 'l.0': must be a number; run `dvc repro finetune@rrcm"),
    "an empty loss": (HISTORY, put(r"^2,1.0", "2,"), "line 3: loss '': must be a number"),
    "a cell more": (HISTORY, put(r"^2,", "2,2,"), "cannot be read as CSV"),
    "more cells in all rows": (HISTORY, put(r"\A.*\n", "epoch,loss,val_accuracy\n"), "more cells than the header"),
    "a cell less": (HISTORY, put(r"^(2,.*),0.1$", r"\1"), "line 3: lr"),
    "an accuracy above 1": (
        HISTORY,
        put(r"^(3,.*,)[\d.]+(,0.1)$", r"\g<1>1.5\2"),
        "val_accuracy '1.5': must be a number",
    ),
    "no share": (
        HISTORY,
        put(r"^(3,.*,)[\d.]+(,0.1)$", r"\g<1>0.12345678901\2"),
        "is no share of 143 validation images",
    ),
    "no val_accuracy": (HISTORY, put("val_accuracy", "val_acuracy"), "has no val_accuracy"),
    "steps of another run": (ENCODER, set_key("training.steps", 500), "steps must be evenly spaced and end with 500"),
    "another objective": (ENCODER, set_key("objective", "moco_v3"), "objective is 'moco_v3', not 'rrcm'"),
    "a step out of order": (STEPS, put("^30,", "90,"), "steps must be evenly spaced"),
    "no level": (STEPS, put(r",\d+$", ",0"), "line 2: levels '0': must be a number from 1"),
    "an infinite term": (STEPS, put(r"^20,0.0,[\d.]+", "20,0.0,inf"), "contrastive 'inf': must be a number"),
    "a cosine above 1": (REPRESENTATION, put(r"[\d.]+$", "1.2"), "centred_cosine '1.2': must be a number from -1"),
    "a clean image unlike itself": (REPRESENTATION, put(r"^0,0.0,0.9,1.0", "0,0.0,0.9,0.7"), "must have cosine 1"),
    "a sigma less": (REPRESENTATION, put(r"^100,0.5,.*\n", ""), "each step must have the sigmas 0, 0.25, 0.5, 1"),
    "another sigma": (REPRESENTATION, put(r"^100,0.5", "100,0.6"), "each step must have the sigmas"),
    "steps that fall": (
        REPRESENTATION,
        lambda text: text.replace("\n200,", "\n50,"),
        "steps must grow and end with 400",
    ),
    "another latency": (LATENCY, set_key("sigma", 0.5), "of another sigma, than the settings"),
    "a round less": (LATENCY, set_key("methods.rrcm.seconds_per_sample", [1e-6]), "has other rounds than the settings"),
    "no time at all": (LATENCY, set_key("methods.rrcm.seconds_per_sample", [1e-6, 0.0, 1e-6]), "greater than 0"),
    "other parameters": (
        LATENCY,
        set_key("methods.rrcm.parameters.classifier", 5),
        "has other parameters than its model",
    ),
    "half a batch": (LATENCY, set_key("methods.rrcm.samples", 1500), "no whole batches"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("case", DAMAGED)
def test_impossible_contents_are_refused_with_the_file_and_the_stage(sources, tmp_path: Path, case: str):
    config, root = sources
    file, change, expected = DAMAGED[case]
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    before = (copy / file).read_text()
    (copy / file).write_text(change(before))
    assert (copy / file).read_text() != before
    with pytest.raises(RRCMError) as caught:
        read_inputs(config, copy)
    message = str(caught.value)
    assert expected in message and "again" in message and "\n" not in message
    assert str(copy / file) in message or "samples.tsv" in message or "history.csv" in message


def test_the_provenance_of_this_machine_is_a_valid_record():
    Environment.model_validate(describe_environment("cpu"))


def test_numbers_are_read_as_they_were_written(tmp_path: Path):
    """Windows line ends are accepted. Whole numbers stay integers, and an accuracy may be missing."""
    (tmp_path / "history.csv").write_bytes(b"epoch,loss,val_accuracy\r\n1,1e-05,\r\n2,-0.25,0.5\r\n")
    frame = read_numbers(tmp_path / "history.csv", ["epoch"], "again")
    assert frame["epoch"].tolist() == [1, 2] and frame["epoch"].dtype == "int64"
    assert frame["loss"].tolist() == [1e-5, -0.25] and frame["val_accuracy"].isna().tolist() == [True, False]


def test_shares_of_images():
    assert all(is_share(correct / total, 143) for total in (143, 4 * 143) for correct in range(total))
    assert not any(is_share(correct / 143 + 1e-13, 143) for correct in range(143))


def test_histories_may_end_within_an_epoch_and_lack_evaluations():
    history = pd.DataFrame({"epoch": [1, 2, 2.5], "val_accuracy": [None, 0.75, 0.5]})
    model = {"training": {"epochs": 2.5}, "selected": {"epoch": 2, "val_accuracy": 0.75}}
    assert check_finetuning(history, model, 4, one_model=True) is None
    ensemble = model | {"selected": {"epoch": 2.5, "val_accuracy": 0.7}}  # its accuracy is none of the members' mean
    assert check_finetuning(history, ensemble, 4, one_model=False) is None
    assert "the best epoch is 2 with 0.75" in check_finetuning(history, ensemble, 4, one_model=True)
    one = {"training": {"epochs": 0.3}, "selected": {"epoch": 0.3, "val_accuracy": 0.5}}
    assert check_finetuning(history.iloc[2:].assign(epoch=0.3), one, 4, one_model=True) is None
    late = history.assign(epoch=[1, 2, 1.5])
    assert "epochs must be" in check_finetuning(late, model | {"training": {"epochs": 1.5}}, 4, one_model=True)
