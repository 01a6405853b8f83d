"""Audit a certificate file: do its radii follow from its votes, and does the published model give these votes?

`check_file` answers the first question without the network. `audit_file` also lets the model vote again on randomly
chosen rows. For a cascade, the models of all sigmas vote again. On the type of machine that published the file, all
counts must be equal. Elsewhere the network rounds differently, and a few votes flip. The flip rate published with the
file says how many votes may have flipped. Exact binomial tests compare each look of each row by itself, and all rows
together. Together they raise a false alarm with probability at most `false_alarm`.
"""

import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from rrcm.certification.agreement import (
    closeness,
    detectable_share,
    least_improbable,
    moved_votes,
    pooled_tail,
    rate_bounds,
    tail,
    votes_to_raise,
)
from rrcm.certification.flips import SAMPLES_PER_IMAGE, count_flips, spread_indices
from rrcm.certification.recompute import recompute_frame
from rrcm.certification.record import CascadeRecord, CertificateRecord, Flips, read_record, record_path
from rrcm.certification.results import VOTES, read_certificates, read_samples, samples_path, sigma_name
from rrcm.certification.revote import (
    AS_PUBLISHED,
    Inputs,
    RowVotes,
    Settings,
    load_inputs,
    published_votes,
    same_computation,
    smooth_again,
    vote_again,
    vote_singly,
)
from rrcm.certification.runtimes import precision_of, runtime_of
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.states import Votes
from rrcm.methods import JOINT
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import sha256_file
from rrcm.utils.progress import Progress
from rrcm.utils.provenance import Environment, describe_environment

SAMPLES_HERE = 10_000  # votes that measure the flip rate of this machine
SPREAD = 2.0  # an image may flip this many times as often as the model's rate says, and so may another machine
RAISE = 0.05  # pixel units; an audit states which share of radii forged by this much it would detect
SHOWN = 3  # rows named for each kind of problem


@dataclass(frozen=True)
class Audit:
    """The outcome of an audit of a certificate file."""

    problems: list[str]  # empty: verified
    rows: int  # in the file
    audited: int = 0  # rows whose votes were counted again
    exact: bool = False  # whether all counts had to be equal
    computation: str = ""  # how the votes were counted again
    moved: int = 0  # votes that now have another class, at the last looks of these rows
    samples: int = 0  # all votes at these looks
    power: float = 0.0  # probability that a forged row is detected when its votes are counted again
    detectable: float | None = None  # the smallest share of forged rows that is detected with 99 % probability
    false_alarm: float = 0.0  # probability that an honest file has problems
    code: str = ""  # the code that certified
    notes: tuple[str, ...] = ()


class Counts(NamedTuple):
    """A comparison of published votes with votes counted again, at B looks or selections."""

    moved: np.ndarray  # (B,) int64, votes that have another class now
    m: np.ndarray  # (B,) int64, all votes
    top: np.ndarray  # (B,) int64, votes for the class with most votes, as counted again


def count_moves(pairs: Iterable[tuple[Votes, Votes]]) -> Counts:
    """Compare pairs of votes, as published and as counted again."""
    rows = [(moved_votes(votes, now), sum(now.values()), max(now.values())) for votes, now in pairs]
    return Counts(*np.array(rows, np.int64).reshape(-1, 3).T)


@dataclass(frozen=True)
class Tolerance:
    """How many votes may have moved."""

    rate: float  # flip rate at a tie
    row_level: float  # significance level of each test of a row
    pooled_level: float  # significance level of the test of all rows together

    def rates(self, counts: Counts, spread: float = 1.0) -> np.ndarray:
        """The flip rate at each of the counts, `spread` times the rate of the model: (B,)."""
        return np.minimum(1.0, spread * self.rate * closeness(counts.top, counts.m))

    def refuses(self, counts: Counts) -> np.ndarray:
        """Whether more votes have moved than rounding can explain, at each of the counts: (B,) bool."""
        return tail(counts.moved, counts.m, self.rates(counts, SPREAD)) <= self.row_level

    def power(self, counts: Counts, shift: float) -> float:
        """The probability to find a row that was changed to raise its radius by sigma * `shift`.

        `counts` are those at the last look of each row. The answer is the mean power of the tests there, over the rows
        that have enough votes to change. All flips of a row are assumed to have one direction, which hides a change as
        often as it adds to it.
        """
        added = votes_to_raise(counts.top, counts.m, shift)
        needed = least_improbable(counts.m, self.rates(counts, SPREAD), self.row_level)
        rates = self.rates(counts)
        power = (tail(needed - added, counts.m, rates) + 1 - tail(added - needed + 1, counts.m, rates)) / 2
        possible = added <= counts.m - counts.top
        return float(power[possible].mean()) if possible.any() else 1.0


def check_file(path: Path) -> tuple[CertificateRecord | CascadeRecord, pd.DataFrame, list[str]]:
    """The record beside a certificate file, the rows of the file with their votes, and the problems of both.

    The tables must have the hashes in the record, and all columns must follow from the votes. Raises `RRCMError` for
    files that are missing or cannot be read.
    """
    record, problems = read_record(record_path(path)), []
    for name, expected in record.files.items():
        if sha256_file(path.with_name(name)) != expected:
            problems.append(f"{path.with_name(name)}: is not the file that {record_path(path).name} describes")
    frame, samples = read_certificates(path, unlabelled=True), read_samples(samples_path(path))
    if frame["idx"].tolist() != samples["idx"].tolist():
        return record, frame, [*problems, f"{path}: has other images than {samples_path(path).name}"]
    frame = frame.join(samples.drop(columns="idx"))
    try:
        recomputed = recompute_frame(frame, record)
    except RRCMError as error:
        return record, frame, [*problems, f"{path}: {error}"]
    lines = []
    for name in recomputed.columns.drop(["idx", "label", "time", *VOTES]):
        for row in np.flatnonzero(frame[name].to_numpy() != recomputed[name].to_numpy()):
            claim, follows = frame[name].iloc[row], recomputed[name].iloc[row]
            lines.append(f"image {frame['idx'].iloc[row]}: {name} is {claim}, but its votes give {follows}")
    return record, frame, problems + _shortened(path, lines)


def audit_file(
    path: Path,
    models: Path | str | Sequence[Path | str],
    images: Path,
    *,
    rows: int | None = None,
    seed: int = 0,
    false_alarm: float = 1e-3,
    settings: Settings = AS_PUBLISHED,
    weights: Path | None = None,
) -> Audit:
    """Check a certificate file, and count the votes of some of its rows again.

    `rows` is the number of these rows (None: all rows), and `seed` selects them. `models` is one model, or one model
    for each sigma if a cascade was certified with several. `images` is the folder of shards, or the folder of pictures
    if pictures were certified. `weights` is a file with the weights of a timm model or of a module of the user's own
    code. An honest file has no problems. Where the counts need not be equal, this holds except with probability
    `false_alarm`. No votes are counted again if the tables, the model or the images differ from the recorded ones.
    Raises `RRCMError` for missing or damaged files and inputs.
    """
    record, frame, problems = check_file(path)
    if problems:
        return Audit(problems, len(frame))
    inputs, problems = load_inputs(path, record, frame, models, images, weights)
    if problems:
        return Audit(problems, len(frame))
    scales = smooth_again(record, inputs, settings)
    chosen = sorted(random.Random(seed).sample(range(len(frame)), min(rows or len(frame), len(frame))))
    published = published_votes(frame.iloc[chosen], record)
    again = _count_again(path, scales, inputs, published)
    code = code_of(record.environment)
    if same_computation(record, scales[0]):
        return replace(compare_equal(path, record, len(frame), published, again), code=code)
    tolerance, problems, notes = allow(path, record, inputs, scales, published, false_alarm)
    audit = compare_close(path, record, len(frame), tolerance, published, again)
    return replace(
        audit,
        problems=problems + audit.problems,
        computation=_describe_computation(record, scales[0]),
        false_alarm=false_alarm,
        code=code,
        notes=notes,
    )


def _describe_computation(record: CertificateRecord | CascadeRecord, smoothed: SmoothedClassifier) -> str:
    """How `smoothed` has voted again."""
    by = ", by torch" if record.runtime and runtime_of(smoothed) is None else ""
    return f"in {precision_of(smoothed)}, batch {smoothed.batch_size}{by}"


def compare_equal(
    path: Path,
    record: CertificateRecord | CascadeRecord,
    rows: int,
    published: Sequence[RowVotes],
    again: Sequence[RowVotes],
) -> Audit:
    """The audit of rows whose counts must be equal."""
    lines = [_difference(record, *pair) for pair in zip(published, again, strict=True) if pair[0] != pair[1]]
    audited, problems = _count_rows(published), _shortened(path, lines)
    share = detectable_share(rows, audited, 1.0)
    return Audit(problems, rows, audited, exact=True, computation="as published", power=1.0, detectable=share)


def compare_close(
    path: Path,
    record: CertificateRecord | CascadeRecord,
    rows: int,
    tolerance: Tolerance,
    published: Sequence[RowVotes],
    again: Sequence[RowVotes],
) -> Audit:
    """The audit of rows whose votes may have flipped: each look of each row by itself, then all rows together."""
    pairs = list(zip(published, again, strict=True))
    every = [_counts(*pair) for pair in pairs]
    row = np.repeat(np.arange(len(every)), list(map(len, every)))
    refused = row[tolerance.refuses(count_moves(each[1:] for counts in every for each in counts))]
    problems = _shortened(path, [_difference(record, *pairs[i]) for i in np.unique(refused)])
    last = count_moves(counts[-1][1:] for counts in every)
    rates = tolerance.rates(last)
    moved, samples = int(last.moved.sum()), int(last.m.sum())
    if pooled_tail(last.moved, last.m, rates) <= tolerance.pooled_level:
        expected = f"{last.m @ rates:.0f} are expected at most"
        problems.append(f"{path}: {moved:,} of {samples:,} votes differ when counted again; {expected}")
    power = tolerance.power(last, RAISE / np.array(record.sigmas)[[row.scale for row in published]])
    audited = _count_rows(published)
    share = detectable_share(rows, audited, power)
    return Audit(problems, rows, audited, False, "", moved, samples, power, share)


def allow(
    path: Path,
    record: CertificateRecord | CascadeRecord,
    inputs: Inputs,
    scales: Sequence[SmoothedClassifier],
    published: Sequence[RowVotes],
    false_alarm: float,
) -> tuple[Tolerance, list[str], tuple[str, ...]]:
    """The tolerance for votes that have moved, the problems and the notes.

    The tolerance follows from the published flip rate, or from the rate of this machine if none is published.

    Half of `false_alarm` goes to the rows, a quarter to all rows together, and a quarter to the bounds on the rates. In
    a cascade, the highest rate of any sigma applies to all of them.
    """
    tests, alpha = sum(1 + len(row.votes) for row in published), false_alarm / 4
    here = _measure_here(record, inputs, scales, list(dict.fromkeys(row.idx for row in published)))
    precision = precision_of(scales[0])
    measured = (record.flips or {}).get(precision)
    known = measured or here
    rate = max(flip_rate(each, alpha / 2 / len(known)) for each in known)
    tolerance = Tolerance(rate, false_alarm / 2 / tests, false_alarm / 4)
    if measured is None:
        return tolerance, [], (f"no flip rate is published for {precision}; it was measured here",)
    least = max(rate_bounds(each.flips, each.samples, each.closeness, alpha / 4 / len(known))[0] for each in known)
    most = SPREAD * max(flip_rate(each, alpha / 4 / len(here)) for each in here)
    if least > most:
        claim = f"publishes a flip rate above {least:.2g} at a tie; on this machine it is below {most:.2g}"
        return tolerance, [f"{record_path(path)}: {claim}"], ()
    return tolerance, [], ()


def flip_rate(flips: Flips, alpha: float) -> float:
    """An upper confidence bound on the flip rate at a tie, raised if the rates of the images differ beyond chance."""
    return max(1.0, flips.dispersion) * rate_bounds(flips.flips, flips.samples, flips.closeness, alpha)[1]


def _measure_here(
    record: CertificateRecord | CascadeRecord,
    inputs: Inputs,
    scales: Sequence[SmoothedClassifier],
    indices: Sequence[int],
) -> list[Flips]:
    """The flips at each sigma on this machine between two precisions, or two batch sizes if the precision is equal.

    The first precision is the one that this machine votes in, and the second is the recorded one. If a runtime other
    than torch computed the file, the second is fp32, because the runtime may round differently in every operation.
    Networks in int8 have no other precision.
    """
    chosen, (precision, size) = spread_indices(indices, SAMPLES_HERE), (precision_of(scales[0]), scales[0].batch_size)
    other = record.precision if record.runtime is None or precision == "int8" else "fp32"
    size = size if other != precision else max(1, size // 2)
    classes = [vote_singly(each, inputs, chosen, SAMPLES_PER_IMAGE) for each in scales]
    others = smooth_again(record, inputs, Settings(other, size, device=str(scales[0].device)))
    return [
        count_flips(first, vote_singly(other, inputs, chosen, SAMPLES_PER_IMAGE), "here")
        for first, other in zip(classes, others, strict=True)
    ]


def _count_again(
    path: Path, scales: Sequence[SmoothedClassifier], inputs: Inputs, published: Sequence[RowVotes]
) -> list[RowVotes]:
    """`vote_again`, with an estimate of the time and progress on stderr."""
    samples = sum(sum(row.selection.values()) + max(map(int, row.votes), default=0) for row in published)
    first, size = published[0], scales[0].batch_size
    probe = [first._replace(selection={"0": size}, votes={})]
    next(vote_again(scales, inputs, probe))  # the first batch takes longer
    start = time.monotonic()
    next(vote_again(scales, inputs, probe))
    seconds = (time.monotonic() - start) * samples / size
    rows = _count_rows(published)
    text = f"votes again on {rows:,} rows, {samples:,} samples, in about {seconds:,.0f} s"
    print(f"{printable(path)}: {text}", file=sys.stderr)
    again, left = [], Counter(row.idx for row in published)  # sigmas at which a row is still to be voted on
    with Progress(rows, f"vote on {printable(path)} again", "rows", only_if_long=True) as progress:
        for group in vote_again(scales, inputs, published):
            again += group
            left.subtract(row.idx for row in group)
            progress.update(sum(left[row.idx] == 0 for row in group))
    return again


def _count_rows(published: Sequence[RowVotes]) -> int:
    """The number of images. A cascade has votes for an image at several sigmas."""
    return len({row.idx for row in published})


def _difference(record: CertificateRecord | CascadeRecord, published: RowVotes, again: RowVotes) -> str:
    """A line with the count of an image that differs most."""
    name, votes, now = max(_counts(published, again), key=lambda each: moved_votes(*each[1:]))
    name += f" at sigma {record.sigmas[published.scale]:g}" * isinstance(record, CascadeRecord)
    return f"image {published.idx}: {moved_votes(votes, now)} of {sum(votes.values())} {name} differ when counted again"


def _counts(published: RowVotes, again: RowVotes) -> list[tuple[str, Votes, Votes]]:
    """All counts of an image: name, votes as published, votes as counted again."""
    looks = [("votes", votes, again.votes[drawn]) for drawn, votes in published.votes.items()]
    return [("selection votes", published.selection, again.selection), *looks]


def _shortened(path: Path, lines: Sequence[str]) -> list[str]:
    """The first lines, each with the path, and a last one that says how many more there are."""
    more = [f"{len(lines) - SHOWN:,} more lines like that"] if len(lines) > SHOWN else []
    return [f"{path}: {line}" for line in [*lines[:SHOWN], *more]]


def find_inputs(path: Path, models: Sequence[str] | None, images: Path | None) -> tuple[list[str], Path]:
    """The models and the images of a certificate file. None stands for the folders in which a result keeps them.

    A result is a folder with certificates/METHOD/sigma_S.tsv or certificates/METHOD/cascade.tsv,
    models/METHOD/sigma_S or models/METHOD/joint, and shards or data/shards. Raises `RRCMError` for a folder that is not
    there.
    """
    root, method = path.absolute().parent.parent.parent, path.absolute().parent.name
    if not models:
        joint = root / "models" / method / JOINT
        models = [str(joint)]
        if not joint.is_dir():
            models = [str(root / "models" / method / name) for name in _expert_folders(path)]
        for model in models:
            if not Path(model).is_dir():
                raise RRCMError(f"{model}: no such folder, where the model of {path} would be; give --model")
    if images is None:
        shards = [root / "shards", root / "data/shards"]
        images = next((folder for folder in shards if folder.is_dir()), None)
        if images is None:
            raise RRCMError(f"{shards[0]}, {shards[1]}: no such folders with the images of {path}; give --images")
    return list(models), images


def _expert_folders(path: Path) -> list[str]:
    """The names of the model folders behind a certificate file, if each sigma has its own."""
    record = read_record(record_path(path)) if record_path(path).is_file() else None
    return [sigma_name(sigma) for sigma in record.sigmas] if isinstance(record, CascadeRecord) else [path.stem]


def verdict(path: Path, audit: Audit, seconds: float) -> str:
    """One line that says what was verified, how, and which forgeries would have been detected."""
    if audit.problems:
        return f"NOT verified: {path}: {len(audit.problems)} problem{'s' * (len(audit.problems) > 1)}, listed above"
    how = "equal" if audit.exact else f"{audit.moved:,} of {audit.samples:,} votes differ, as rounding explains"
    how += f" at a false alarm of {audit.false_alarm:g}" * (not audit.exact)
    forged = "forged rows" if audit.exact else f"rows raised by {RAISE}"
    share = (
        f"would detect {audit.detectable:.1%} {forged} with 99 %"
        if audit.detectable
        else f"would not detect {forged} individually"
    )
    again = f"{audit.audited} voted again {audit.computation}: {how} ({share})"
    here = code_of(Environment.model_validate(describe_environment("cpu")))
    codes = f"certified by {audit.code}, audited by {here}"
    parts = [f"{audit.rows} of {audit.rows} radii follow from their votes", again, *audit.notes, codes]
    return f"verified: {path}, {', '.join(parts)}, {seconds:.0f} s"


def code_of(environment: Environment) -> str:
    """The revision of the code that ran, and whether the code had uncommitted changes."""
    git = environment.git
    return "code without git" if git is None else f"code {git.revision[:7]} ({'changed' if git.dirty else 'clean'})"
