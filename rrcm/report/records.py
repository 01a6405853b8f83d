"""Read and check the JSON records and CSV histories that other stages write for the report.

A record is a pydantic model of the keys that the report uses; other keys are ignored. A history is a CSV file of
numbers. Every `RRCMError` names the file, the key or line, and the stage to run again.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from rrcm.config import Count, NonNegative, Positive, Probability
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import read_json
from rrcm.utils.provenance import Environment

NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?", re.ASCII)  # as Python and pandas write numbers
SHARE_ERROR = 1e-15  # largest rounding error of a share of images
RANGES = {  # by column; other columns hold any finite number
    "epoch": (0, math.inf),
    "step": (0, math.inf),
    "sigma": (0, math.inf),
    "levels": (1, math.inf),
    "grad_norm": (0, math.inf),
    "lr": (0, math.inf),
    "teacher_decay": (0, 1),
    "val_accuracy": (0, 1),
    "knn": (0, 1),
} | dict.fromkeys(("same_image_cosine", "cross_image_cosine", "centred_cosine"), (-1 - 1e-6, 1 + 1e-6))
OPTIONAL = {"val_accuracy"}  # columns with empty cells


class Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Timing(Record):
    """How long a stage took."""

    seconds: NonNegative
    environment: Environment


class Cost(Record):
    """How long the images of a certification took."""

    seconds: NonNegative
    samples: Count
    seconds_by_image: dict[str, NonNegative]


class CertifyTiming(Timing, Cost):
    """How long a certification took."""


class Choice(Record):
    """How long it took to count the votes from which thresholds were chosen."""

    seconds: NonNegative
    samples: Count


class CascadeTiming(CertifyTiming):
    """How long a cascade took: its certification, the one by the published rule, and the choice of thresholds."""

    multi_scale: Cost | None = None
    thresholds: Choice | None = None


class Parts(Record):
    """A number for the denoiser and one for the classifiers."""

    denoiser: NonNegative
    classifier: Positive


class MethodLatency(Record):
    """The latency of a method, with the seconds per sample in each round."""

    parameters: Parts
    passes: Parts
    batch_size: Count
    samples: Count
    seconds_per_sample: list[Positive]


class CascadeLatency(Record):
    """The latency of a cascade: seconds per sample at each sigma, and seconds to predict, in each round."""

    seconds_per_sample: dict[str, list[Positive]]
    predict_seconds: list[Positive]
    single_predict_seconds: list[Positive]


class Latency(Record):
    """The record that the latency stage writes."""

    device: str
    dtype: Literal["fp32", "bf16"]
    sigma: Positive
    methods: dict[str, MethodLatency]
    cascades: dict[str, CascadeLatency] = {}
    environment: Environment


class CleanAccuracy(Timing):
    """How many clean images each base classifier gets right, by method and the name of its sigma."""

    correct: dict[str, dict[str, int]]
    images: dict[str, Count]


class _Length(Record):
    epochs: NonNegative


class _Selected(Record):
    epoch: NonNegative
    val_accuracy: Probability | None


class _Compute(Record):
    finetune: NonNegative
    pretrain_share: NonNegative
    soft_label_share: NonNegative
    joint: NonNegative = 0.0  # of the joint training that was continued
    teacher: NonNegative = 0.0  # of all that the teacher of a student has cost


class _JointSigmas(Record):
    sigmas: list[Positive]
    interval: list[Positive] | None


class ModelRecord(Record):
    """config.json of a model folder."""

    method: str
    sigma: Positive | None = None  # of an expert
    joint: _JointSigmas | None = None  # of a joint model, in place of `sigma`
    seed: int
    class_names: list[str]
    parameters: Count
    training: _Length
    selected: _Selected
    compute: _Compute


class _Steps(Record):
    steps: Count


class _PretrainCompute(Record):
    pretrain: NonNegative


class PretrainRecord(Record):
    """config.json of a pre-trained encoder."""

    objective: str
    training: _Steps
    compute: _PretrainCompute


def read_record(path: Path, kind: type[Record], advice: str) -> dict:
    """The JSON file `path`, which must be a record of type `kind`. Raises `RRCMError`, which ends with `advice`."""
    value = read_json(path)
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise RRCMError(f"{path}: {key + ': ' if key else ''}{first['msg']}; {advice}") from None
    return value


def read_numbers(path: Path, columns: Sequence[str], advice: str) -> pd.DataFrame:
    """A CSV file of numbers with at least `columns`, all of them within RANGES. An empty cell is NaN.

    Raises `RRCMError` for any other file. The message ends with `advice`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if odd := re.search(r"[^\n\x20-\x7e]", text):
            raise ValueError(f"has the character {odd[0]!r}")
        cells = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, skip_blank_lines=False, quoting=3)
        if not isinstance(cells.index, pd.RangeIndex):
            raise ValueError("has rows with more cells than the header")
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise RRCMError(f"{path}: cannot be read as CSV ({one_line(error)}); {advice}") from None
    if missing := [name for name in columns if name not in cells] or ["row"] * cells.empty:
        raise RRCMError(f"{path}: has no {missing[0]}; {advice}")
    for name, column in cells.items():
        low, high = RANGES.get(name, (-math.inf, math.inf))
        for line, cell in enumerate(column, start=2):
            number = float(cell) if NUMBER.fullmatch(str(cell)) else math.nan
            if not (low <= number <= high and math.isfinite(number)) and (cell != "" or name not in OPTIONAL):
                within = "" if math.isinf(low) else f" from {low:.6g}" + ("" if math.isinf(high) else f" to {high:.6g}")
                raise RRCMError(f"{path}, line {line}: {name} {cell!r}: must be a number{within}; {advice}")
    return cells.where(cells != "").apply(pd.to_numeric)


def is_share(value: float, images: int) -> bool:
    """Whether `value` can be a share of at most `images` images, or of up to 64 noisy copies of each."""
    return abs(Fraction(value).limit_denominator(64 * images) - Fraction(value)) < SHARE_ERROR


def check_finetuning(history: pd.DataFrame, model: Mapping, images: int, one_model: bool) -> str | None:
    """What is wrong with the history of a fine-tuning, or None.

    `model` is its `ModelRecord`. `images` is the size of the validation split. With `one_model`, the selected weights
    must be the first with the highest accuracy in the history. The accuracy of an ensemble is not in its history.
    """
    epochs, accuracy, selected = history["epoch"], history["val_accuracy"], model["selected"]
    if epochs.tolist() != [*range(1, len(epochs)), model["training"]["epochs"]] or len(epochs) - 1 >= epochs.iloc[-1]:
        return f"epochs must be 1, 2, ... to {model['training']['epochs']:g}, as config.json says"
    if one_model and (off := [value for value in accuracy.dropna() if not is_share(value, images)]):
        return f"val_accuracy {off[0]}: is no share of {images:,} validation images"
    if accuracy.isna().all():
        return "no epoch has a val_accuracy"
    best = history.loc[accuracy.idxmax(), ["epoch", "val_accuracy"]].to_dict()
    if one_model and best != selected:
        return f"the best epoch is {best['epoch']:g} with {best['val_accuracy']}, in config.json it is another"
    return None


def check_cost(cost: Mapping, frame: pd.DataFrame) -> str | None:
    """What is wrong with a `Cost` of the certificates in `frame`, or None."""
    images = cost["seconds_by_image"]
    if list(images) != [str(idx) for idx in frame["idx"]] or cost["samples"] != frame["samples"].sum():
        return "has other images or another sum of samples than the certificates"
    if not math.isclose(sum(images.values()), cost["seconds"], rel_tol=1e-9):
        return "seconds is not the sum of seconds_by_image"
    return None


def check_pretraining(history: pd.DataFrame, model: Mapping) -> str | None:
    """What is wrong with the history of a pre-training whose `PretrainRecord` is `model`, or None."""
    steps, last = history["step"].tolist(), model["training"]["steps"]
    if steps != [min(steps[0] * row, last) for row in range(1, len(steps) + 1)] or steps[-1] != last:
        return f"steps must be evenly spaced and end with {last}, as config.json says"
    return None


def check_representation(frame: pd.DataFrame, model: Mapping, sigmas: Sequence[float], images: int) -> str | None:
    """What is wrong with representation.csv, which is of at most `images` validation images, or None."""
    expected = [0.0, *sigmas]
    steps = frame["step"].to_numpy()[:: len(expected)]
    if len(frame) != len(steps) * len(expected) or (frame["step"] != np.repeat(steps, len(expected))).any():
        return f"each step must have the sigmas {', '.join(f'{sigma:g}' for sigma in expected)}"
    if frame["sigma"].tolist() != expected * len(steps):
        return f"each step must have the sigmas {', '.join(f'{sigma:g}' for sigma in expected)}"
    if (np.diff(steps) <= 0).any() or steps[-1] != model["training"]["steps"]:
        return f"steps must grow and end with {model['training']['steps']}, as config.json says"
    if off := [value for value in frame["knn"] if not is_share(value, images)]:
        return f"knn {off[0]}: is no share of {images:,} validation images"
    if ((frame.loc[frame["sigma"] == 0, "same_image_cosine"] - 1).abs() > 1e-6).any():
        return "clean images must have cosine 1 with themselves"
    return None
