"""The record beside a certificate file: everything that decided the certificates, so that the file explains itself.

The certificates of a file are of one smoothed classifier (`CertificateRecord`) or of a cascade (`CascadeRecord`). Both
have the attributes `sigmas`, `models` and `num_outputs`, so that an audit treats a smoothed classifier as a cascade of
one sigma.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from rrcm.certification.cascade_rules import CascadeRule, check_scales, make_cascade_rule
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.stopping import StoppingRule
from rrcm.config import Count, NonNegative, Positive, Probability
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json
from rrcm.utils.provenance import Environment, describe_environment

if TYPE_CHECKING:
    from rrcm.certification.cascade import CascadedClassifier
    from rrcm.certification.smoothing import SmoothedClassifier  # imports torch, which reading a record does without

FORMAT = 1
ADDED = ("runtime", "quantized")  # entries that records of torch do not have, as those of earlier versions
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Dtype = Literal["fp32", "bf16", "int8"]


class Entries(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="forbid")


class ModelRecord(Entries):
    """Which model voted."""

    kind: str  # of a model folder, else "file" or "weights"
    sha256: Sha256  # of the folder (`sha256_folder`), of the file, or of the weights (`sha256_tensors`)


class DataRecord(Entries):
    """Which images were certified."""

    sha256: Sha256  # `ShardedDataset.fingerprint`, or `sha256_images` of a folder
    split: str | None  # None: a folder of images in the order of their paths
    every: Count = 1  # with `max_images` it chooses the images of the split (`choose_rows`)
    max_images: Annotated[list[Count | None], Field(min_length=2, max_length=2)] = [None, None]


class Quantization(Entries):
    """Which networks in int8 voted."""

    by: str  # the package that quantized, and its version
    sha256: Annotated[list[Sha256], Field(min_length=1)]  # of the program of each sigma (`Quantized`)


class Flips(Entries):
    """How often a vote flips between the certified computation and another one with the same noise.

    Votes flip near a tie of two classes. An image whose top class has the share p of the votes therefore has the flip
    rate at a tie times its closeness, phi(Phi^-1(p)) / phi(0).
    """

    against: str  # what differs in the other computation, such as "fp32" or "batch 512"
    images: Count
    samples: Count  # of all images
    flips: Annotated[int, Field(ge=0)]
    closeness: Annotated[float, Field(gt=0, le=1)]  # mean over the images
    dispersion: NonNegative  # mean of (flips - expected)^2 / expected; about 1 if one rate fits all images


class Record(Entries):
    """The entries that the records of smoothed classifiers and of cascades have in common."""

    format: Literal[1]
    data: DataRecord
    num_classes: Annotated[int, Field(ge=2)]
    image_size: Count  # pixels
    stopping: Literal["fixed", "sequential"]
    bound: Literal["binary", "margin"]
    n0: Count
    n: Count
    alpha: Probability
    radius_step: Positive  # pixel units
    labelled: bool  # whether a wrong class ended the sampling of an image
    seed: int
    precision: Dtype
    runtime: Annotated[str, Field(pattern=r"^openvino \d[\w.+-]*$")] | None = None  # of the network; None: torch
    quantized: Quantization | None = None  # None: another precision than int8
    batch_size: Count
    compile: bool
    device: str
    environment: Environment
    files: dict[str, Sha256]  # the tables beside it, by name
    flips: dict[Dtype, list[Flips]] | None = None  # by the precision of the other computation; added at publication

    @model_serializer(mode="wrap")
    def _entries(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """The entries, without those that would say nothing."""
        return {name: value for name, value in serialize(self).items() if value is not None or name not in ADDED}

    @property
    def rule_settings(self) -> dict[str, object]:
        """The settings of the stopping rule without sigmas and thresholds."""
        return {name: getattr(self, name) for name in ("n0", "n", "alpha", "radius_step", "bound")}


class CertificateRecord(Record):
    """The JSON file beside the certificates of a smoothed classifier."""

    model: ModelRecord
    sigma: Positive  # pixel units
    consensus: None = Field(default=None, exclude=True)  # null in records of earlier versions

    @model_serializer(mode="wrap")
    def _entries(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """The entries in the order of records of earlier versions."""
        entries = super()._entries(serialize)
        first = ("format", "model", "data", "num_classes", "image_size", "sigma")
        return {name: entries[name] for name in dict.fromkeys((*first, *entries)) if name in entries}

    @property
    def sigmas(self) -> list[float]:
        return [self.sigma]

    @property
    def models(self) -> list[ModelRecord]:
        return [self.model]

    @property
    def num_outputs(self) -> list[int]:
        return [self.num_classes]

    def rule(self) -> StoppingRule:
        """The stopping rule. Raises `RRCMError` for impossible settings."""
        return make_stopping_rule(self.stopping, self.sigma, **self.rule_settings)


class ChosenThresholds(Entries):
    """How the thresholds of a cascade were chosen, on validation images."""

    by: Literal["acr"] | dict[str, float]  # the score: ACR, or the weight of the certified accuracy at each radius
    n: Count  # votes of each image and sigma
    images: Count
    score: Annotated[float, Field(ge=0)]  # of the thresholds


class CascadeRecord(Record):
    """The JSON file beside the certificates of a cascade. Lists have an entry for each sigma, by increasing sigma."""

    models: Annotated[list[ModelRecord], Field(min_length=1)]  # a single one serves all sigmas
    sigmas: list[Positive]  # pixel units
    thresholds: list[float]  # of all sigmas but the smallest, pixel units
    certificates: Literal["label-aware", "multi-scale"]
    can_pass: bool  # whether the base classifiers of all sigmas but the smallest may answer "pass"
    chosen: ChosenThresholds | None = None  # None: the thresholds were given

    @model_validator(mode="after")
    def _fit(self) -> Self:
        try:
            check_scales(self.sigmas, self.thresholds)
        except RRCMError as error:
            raise ValueError(str(error)) from None
        if len(self.models) not in (1, len(self.sigmas)):
            raise ValueError(f"{len(self.models)} models for {len(self.sigmas)} sigmas")
        return self

    @property
    def num_outputs(self) -> list[int]:
        """How many answers each base classifier may give, among them "pass"."""
        return [self.num_classes + (self.can_pass and k > 0) for k in range(len(self.sigmas))]

    def rule(self) -> CascadeRule:
        """The stopping rule. Raises `RRCMError` for impossible settings."""
        settings = {"certificates": self.certificates, **self.rule_settings}
        return make_cascade_rule(self.stopping, self.sigmas, self.thresholds, **settings)


def make_record(
    smoothed: SmoothedClassifier, batch_size: int, tables: Mapping[Path, bytes], **entries: object
) -> CertificateRecord:
    """The record of the certificate `tables` of `smoothed`, certified on this machine. `entries` are the other ones."""
    described = _describe(smoothed, batch_size, tables)
    return CertificateRecord(num_classes=smoothed.num_classes, sigma=smoothed.sigma, **{**described, **entries})


def make_cascade_record(
    cascade: CascadedClassifier, batch_size: int, tables: Mapping[Path, bytes], **entries: object
) -> CascadeRecord:
    """The record of the certificate `tables` of a cascade, certified on this machine, with further `entries`."""
    return CascadeRecord(
        num_classes=cascade.num_classes,
        sigmas=list(cascade.sigmas),
        thresholds=list(cascade.thresholds),
        can_pass=cascade.can_pass,
        **{**_describe(cascade.scales[0], batch_size, tables), **entries},
    )


def _describe(smoothed: SmoothedClassifier, batch_size: int, tables: Mapping[Path, bytes]) -> dict[str, object]:
    """The entries about the computation and the tables. A cascade computes in the same way at all sigmas."""
    return {
        "format": FORMAT,
        "seed": smoothed.seed,
        "precision": smoothed.precision,
        "batch_size": batch_size,
        "device": smoothed.device.type,
        "environment": describe_environment(smoothed.device),
        "files": {path.name: hashlib.sha256(content).hexdigest() for path, content in tables.items()},
    }


def record_path(path: Path) -> Path:
    """The record OUTPUT.json beside a certificate file OUTPUT.tsv."""
    return path.with_suffix(".json")


def record_bytes(record: Record) -> bytes:
    """The content of the record's file."""
    return f"{record.model_dump_json(indent=2)}\n".encode()


def read_record(path: Path) -> CertificateRecord | CascadeRecord:
    """The record in the JSON file `path`. Raises `RRCMError` for a missing or damaged one."""
    values = read_json(path)
    if isinstance(values, dict) and (consensus := values.get("consensus")) is not None:
        raise RRCMError(
            f"{path}: was certified with consensus {consensus!r}, which is no longer supported; read it with the code "
            "of commit 2a24858, or certify again"
        )
    try:
        kind = CascadeRecord if isinstance(values, dict) and "sigmas" in values else CertificateRecord
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RRCMError(
            f"{path}: {f'{place}: ' if place else ''}{first['msg']}; it is no record of a certification: certify again"
        ) from None
