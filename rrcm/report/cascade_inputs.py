"""The files of cascades that a report is made from, read and checked."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from rrcm.certification.cascade_rules import LABEL_AWARE, MULTI_SCALE
from rrcm.certification.cascade_votes import CASCADE_FILES, parse_selection
from rrcm.certification.record import CascadeRecord, read_record, record_path
from rrcm.certification.results import read_certificates, read_samples, samples_path
from rrcm.config import Config
from rrcm.evaluation.metrics import Certificates
from rrcm.methods import CASCADE, METHODS
from rrcm.report.records import CascadeTiming, check_cost
from rrcm.report.records import read_record as read_timing
from rrcm.utils.errors import RRCMError


class Cascade(NamedTuple):
    """The certificates of a method's cascade, for the images that each single sigma certifies as well.

    A frame has the columns of a certificate file and of its samples file, and `accepting_sigma`: the sigma at which the
    path of the certificate ends, NaN if nothing is certified.
    """

    record: CascadeRecord  # of the label-aware certificates
    label_aware: pd.DataFrame
    multi_scale: pd.DataFrame | None  # by the rule of Jeong & Shin, if the settings ask for it
    seconds: Mapping[str, float]  # of its certification, and if thresholds were chosen of that
    passed: Mapping[float, float]  # by sigma: share of the selection votes for "pass"; {} if there is no such answer

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        """The certificates of the one deployment: "cascade", and if there are any "multi-scale"."""
        both = {CASCADE: self.label_aware, MULTI_SCALE: self.multi_scale}
        return {name: frame for name, frame in both.items() if frame is not None}


def cascade_stage(method: str) -> str:
    """The stage that certifies the cascade of a method."""
    return f"certify-cascade@{method}"


def cascade_tables(config: Config, method: str) -> dict[str, str]:
    """The certificate files of a method's cascade by their kind of certificates, relative to the root."""
    kinds = [LABEL_AWARE, *([MULTI_SCALE] if config.cascade.multi_scale else [])]
    return {kind: f"certificates/{method}/{CASCADE_FILES[kind]}.tsv" for kind in kinds}


def cascade_files(config: Config, method: str) -> list[str]:
    """Every file of a method's cascade that the report reads, relative to the root."""
    tables = [Path(table) for table in cascade_tables(config, method).values()]
    beside = [path for table in tables for path in (table, samples_path(table), record_path(table))]
    return [*(path.as_posix() for path in beside), cascade_timing(method)]


def cascade_timing(method: str) -> str:
    """The record of how long the stage took, relative to the root."""
    return f"timings/certify_cascade/{method}.json"


def read_cascades(config: Config, root: Path, certificates: Certificates, num_classes: int) -> dict[str, Cascade]:
    """The cascade of each method in `cascade.methods`. `certificates` belong to single sigmas.

    Raises `RRCMError` for files that are damaged, exchanged, or made with other settings or images, with the stage to
    run again.
    """
    cascades = {}
    for method in config.cascade.methods:
        advice = f"run `dvc repro {cascade_stage(method)}` again, or fetch its outputs with `dvc pull`"
        records, frames = {}, {}
        for kind, table in cascade_tables(config, method).items():
            path = root / table
            records[kind] = _read_record(path, advice)
            if problem := _differs(records[kind], kind, method, config, num_classes):
                raise RRCMError(f"{record_path(path)}: {problem}; {advice}")
            frames[kind] = _read_frame(path, records[kind], advice)
            if problem := _of_other_images(frames[kind], certificates[method, records[kind].sigmas[0]]):
                raise RRCMError(f"{path}: {problem}; {advice}")
        if len({tuple(record.thresholds) for record in records.values()}) > 1:
            raise RRCMError(f"{record_path(path)}: has other thresholds than the cascade beside it; {advice}")
        record, label_aware = records[LABEL_AWARE], frames[LABEL_AWARE]
        passed = _share_of_pass(label_aware, record) if record.can_pass else {}
        seconds = _read_seconds(root / cascade_timing(method), frames, advice)
        cascades[method] = Cascade(record, label_aware, frames.get(MULTI_SCALE), seconds, passed)
    return cascades


def _read_record(path: Path, advice: str) -> CascadeRecord:
    try:
        record = read_record(record_path(path))
    except RRCMError as error:
        raise RRCMError(f"{error}; {advice}") from None
    if not isinstance(record, CascadeRecord):
        raise RRCMError(f"{record_path(path)}: is the record of a single sigma, not of a cascade; {advice}")
    return record


def _differs(record: CascadeRecord, kind: str, method: str, config: Config, num_classes: int) -> str | None:
    """How a record differs from the settings, or None if it does not."""
    settings, chosen, sigmas = config.cascade, record.chosen, config.cascade_sigmas
    expected = {"certificates": kind, "sigmas": sigmas, "seed": config.seed}
    expected |= {"num_classes": num_classes, "image_size": config.data.image_size} | config.certify.rule
    if settings.thresholds != "chosen":
        expected |= {"thresholds": settings.thresholds, "chosen": None}
    for key, value in expected.items():
        if getattr(record, key) != value:
            return f"{key} differs from the settings"
    if len(record.models) != (len(sigmas) if METHODS[method].joint is None else 1):
        return f"has {len(record.models)} base classifiers, other than {method} has"
    if settings.thresholds == "chosen":
        asked = _choice(settings.choose_by, settings.choose_n)
        if chosen is None or _choice(chosen.by, chosen.n) != asked:
            return "its thresholds were not chosen as the settings say"
    return None


def _choice(by: str | Mapping, n: int) -> tuple:
    """How thresholds are chosen, in a form that can be compared: JSON has radii as text."""
    return by if isinstance(by, str) else {float(radius): weight for radius, weight in by.items()}, n


def _read_frame(path: Path, record: CascadeRecord, advice: str) -> pd.DataFrame:
    """The certificates in `path` with the columns of their samples file. Both must be the files of `record`."""
    for file in (path, samples_path(path)):
        if record.files.get(file.name) != hashlib.sha256(file.read_bytes()).hexdigest():
            raise RRCMError(f"{file}: is not the file that the record beside it describes; {advice}")
    frame, samples = read_certificates(path), read_samples(samples_path(path))
    if not samples["idx"].equals(frame["idx"]) or "path" not in samples:
        raise RRCMError(f"{samples_path(path)}: has other images, or not the columns of a cascade; {advice}")
    accepting = [float(text.partition(" ")[0]) if text else np.nan for text in samples["path"]]
    return frame.join(samples.drop(columns="idx")).assign(accepting_sigma=accepting)


def _of_other_images(frame: pd.DataFrame, single: pd.DataFrame) -> str | None:
    """How the images differ from those of single sigmas, so that no image has both results. None if they do not."""
    for column, what in (("idx", "certifies other images"), ("label", "has other labels")):
        if not np.array_equal(frame[column], single[column]):
            return f"{what} than the certificates of single sigmas"
    return None


def _read_seconds(path: Path, frames: Mapping[str, pd.DataFrame], advice: str) -> dict[str, float]:
    """The seconds of the stage's parts. Raises `RRCMError` for a record that does not match the certificates."""
    timing = read_timing(path, CascadeTiming, advice)
    costs = {LABEL_AWARE: timing, MULTI_SCALE: timing.get("multi_scale")}
    for kind, frame in frames.items():
        problem = f"has no {CASCADE_FILES[kind]}" if costs[kind] is None else check_cost(costs[kind], frame)
        if problem:
            raise RRCMError(f"{path}: {problem}; {advice}")
    choice = timing.get("thresholds")
    return {"certification": timing["seconds"]} | ({"thresholds": choice["seconds"]} if choice else {})


def _share_of_pass(frame: pd.DataFrame, record: CascadeRecord) -> dict[float, float]:
    """By sigma, the share of the selection votes for "pass" among the images for which the sigma was asked."""
    votes = [parse_selection(text, record.sigmas) for text in frame["selection"]]
    shares = {}
    for scale, sigma in list(enumerate(record.sigmas))[1:]:
        asked = [counts[scale] for counts in votes if counts[scale]]
        passed = sum(counts.get(str(record.num_classes), 0) for counts in asked)
        shares[sigma] = passed / sum(sum(counts.values()) for counts in asked) if asked else 0.0
    return shares
