"""The record beside a certificate file: everything that decided the certificates, so that the file explains itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.stopping import StoppingRule
from rrcm.config import Count, NonNegative, Positive, Probability
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json
from rrcm.utils.provenance import Environment, describe_environment

if TYPE_CHECKING:
    from rrcm.certification.smoothing import SmoothedClassifier  # imports torch, which reading a record does without

FORMAT = 1
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Dtype = Literal["fp32", "bf16"]


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


class CertificateRecord(Entries):
    """The JSON file beside a certificate file."""

    format: Literal[1]
    model: ModelRecord
    data: DataRecord
    num_classes: Annotated[int, Field(ge=2)]
    image_size: Count  # pixels
    sigma: Positive  # pixel units
    stopping: Literal["fixed", "sequential"]
    bound: Literal["binary", "margin"]
    n0: Count
    n: Count
    alpha: Probability
    radius_step: Positive  # pixel units
    labelled: bool  # whether a wrong class ended the sampling of an image
    seed: int
    precision: Dtype
    batch_size: Count
    compile: bool
    consensus: None = Field(default=None, exclude=True)  # null in records of earlier versions
    device: str
    environment: Environment
    files: dict[str, Sha256]  # the tables beside it, by name
    flips: dict[Dtype, list[Flips]] | None = None  # by the precision of the other computation; added at publication

    def rule(self) -> StoppingRule:
        """The stopping rule. Raises `RRCMError` for impossible settings."""
        names = ("stopping", "sigma", "n0", "n", "alpha", "radius_step", "bound")
        return make_stopping_rule(**{name: getattr(self, name) for name in names})


def make_record(
    smoothed: SmoothedClassifier, batch_size: int, tables: Mapping[Path, bytes], **entries: object
) -> CertificateRecord:
    """The record of the certificate `tables` of `smoothed`, certified on this machine. `entries` are the other ones."""
    return CertificateRecord(
        format=FORMAT,
        num_classes=smoothed.num_classes,
        sigma=smoothed.sigma,
        seed=smoothed.seed,
        precision=smoothed.precision,
        batch_size=batch_size,
        device=smoothed.device.type,
        environment=describe_environment(smoothed.device),
        files={path.name: hashlib.sha256(content).hexdigest() for path, content in tables.items()},
        **entries,
    )


def record_path(path: Path) -> Path:
    """The record OUTPUT.json beside a certificate file OUTPUT.tsv."""
    return path.with_suffix(".json")


def record_bytes(record: CertificateRecord) -> bytes:
    """The content of the record's file."""
    return f"{record.model_dump_json(indent=2)}\n".encode()


def read_record(path: Path) -> CertificateRecord:
    """The record in the JSON file `path`. Raises `RRCMError` for a missing or damaged one."""
    values = read_json(path)
    if isinstance(values, dict) and (consensus := values.get("consensus")) is not None:
        raise RRCMError(
            f"{path}: was certified with consensus {consensus!r}, which is no longer supported; read it with the code "
            "of commit 2a24858, or certify again"
        )
    try:
        return CertificateRecord.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RRCMError(f"{path}: {place}: {first['msg']}; it is no record of a certification: certify again") from None
