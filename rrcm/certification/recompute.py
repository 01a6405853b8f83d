"""Recompute the certificates of a file from the votes beside it, without the network."""

from pathlib import Path

import pandas as pd

from rrcm.certification.cascade_votes import recompute_cascade
from rrcm.certification.record import CascadeRecord, CertificateRecord, read_record, record_path
from rrcm.certification.results import read_certificates, read_samples, samples_path
from rrcm.certification.votes import recompute
from rrcm.utils.errors import RRCMError


def recompute_frame(frame: pd.DataFrame, record: CertificateRecord | CascadeRecord) -> pd.DataFrame:
    """`recompute` or `recompute_cascade` for the rows of a certificate file and its samples file.

    The record beside the file has the stopping rule. Raises `RRCMError` for the first image with votes that the rule
    cannot lead to, and for a samples file of the other kind.
    """
    cascade = isinstance(record, CascadeRecord)
    if cascade != ("path" in frame):
        raise RRCMError("only one of the record and the samples file is of a cascade; certify again")
    again = recompute_cascade if cascade else recompute
    return again(frame, record.rule(), record.num_classes, labelled=record.labelled)


def recompute_radii(path: Path | str) -> pd.DataFrame:
    """The columns `idx`, `predict` and `radius` of a certificate file, recomputed from the votes beside it.

    The file may be of a smoothed classifier or of a cascade. The record beside it has the stopping rule. Only the
    labels are read from the file itself. Raises `RRCMError` for files that are missing or damaged, and for votes that
    the stopping rule cannot lead to.

    >>> rrcm.recompute_radii("certificates.tsv").columns.tolist()
    ['idx', 'predict', 'radius']
    """
    path = Path(path)
    record, samples = read_record(record_path(path)), read_samples(samples_path(path))
    table = read_certificates(path, unlabelled=True)
    if not table["idx"].equals(samples["idx"]):
        raise RRCMError(f"{path}: has other images than {samples_path(path)}; certify again")
    return recompute_frame(samples.assign(label=table["label"]), record)[["idx", "predict", "radius"]]
