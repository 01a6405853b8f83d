"""Verify published results: files by their hashes, figures by the votes, and random votes by the networks.

Nothing is written outside temporary folders, unless a run is neither in its folder nor among DVC's local objects: then
it is pulled.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rrcm.certification.agreement import detectable_share
from rrcm.certification.audit import RAISE, Audit, audit_file, check_file
from rrcm.certification.record import CascadeRecord, CertificateRecord
from rrcm.certification.results import read_certificates
from rrcm.certification.validation_votes import are_of_other_images, choose_by_votes, read_votes_table
from rrcm.config import Config
from rrcm.data.sharding import write_shards
from rrcm.data.shards import ShardedDataset
from rrcm.publication.freeze import CODE, threshold_votes, with_test_images
from rrcm.publication.objects import folder_md5, open_run, tracked_md5
from rrcm.publication.readme import README, check_readme
from rrcm.publication.result import (
    RESULTS,
    CertificateFile,
    Result,
    ResultRecord,
    certificate_files,
    files_below,
    hash_files,
    short,
    summarize_stages,
)
from rrcm.publication.settings import load_settings
from rrcm.report.build import write_report
from rrcm.report.cascade_inputs import cascade_tables
from rrcm.report.inputs import MANIFEST, SHARDS
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, sha256_folder
from rrcm.utils.provenance import changed_since, head, uncommitted

FALSE_ALARM = 1e-3  # probability that the votes of an honest result on another machine are called forged
WATCHED = (*CODE, RESULTS, README)  # files and folders that must be as in the commit


@dataclass
class Verdict:
    """The outcome of verifying a result. Its text is one line."""

    result: Result
    problems: list[str] = field(default_factory=list)
    tree: str = ""  # the code that verifies
    computed: str = "unknown code"  # the code that computed the result
    rows: int = 0  # certificates
    files: int = 0  # of certificates
    votable: int = 0  # certificates whose network is included
    audits: list[Audit] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def audited(self) -> int:
        """The number of rows that have been voted on again."""
        return sum(audit.audited for audit in self.audits)

    @property
    def share(self) -> float | None:
        """The smallest share of forged rows among the votable that the audits find with probability 99 %, or None."""
        power = sum(audit.power * audit.audited for audit in self.audits) / max(self.audited, 1)
        return detectable_share(self.votable, self.audited, power)

    def __str__(self) -> str:
        chosen = "" if self.votable == self.rows else f" of the {self.votable:,} with networks"
        return (
            f"{self._answer}, {self.rows:,} rows in {self.files:,} files, "
            f"{self.audited:,}{chosen} voted again{self._agreement}, "
            f"computed by {self.computed}, tree {self.tree}, {self.seconds:.0f} s"
        )

    @property
    def _answer(self) -> str:
        count = len(self.problems)
        if not count:
            return f"verified: {self.result.label}"
        return f"NOT verified: {self.result.label}: {count} problem{'s' * (count > 1)}, listed above"

    @property
    def _agreement(self) -> str:
        """How well the votes agree, and what share of forged rows would have been detected."""
        if self.problems or not self.audited:
            return ""
        exact = all(audit.exact for audit in self.audits)
        moved, samples = (sum(getattr(audit, name) for audit in self.audits) for name in ("moved", "samples"))
        how = "equal" if exact else f"{moved:,} of {samples:,} votes differ, as rounding explains"
        forged = "forged rows" if exact else f"rows raised by {RAISE}"
        if self.share is None:
            return f": {how} (would not detect {forged} individually)"
        return f": {how} (would detect {self.share:.1%} {forged} with 99 %)"


def verify_result(result: Result, rows: int | None, seed: int, shared: Sequence[str] = ()) -> Verdict:
    """Verify a result. It is verified if the verdict has no problems. `shared` are problems of the whole repository.

    `seed` chooses `rows` certificates to vote on again. None means all certificates.
    """
    start, verdict = time.monotonic(), Verdict(result, [*shared], tree=describe_tree(result.root))
    try:
        record = result.read()
        verdict.computed = f"{', '.join(record.commits) or 'no commit'} ({'clean' if record.is_clean else 'dirty'})"
        if not record.is_clean:
            verdict.problems.append(f"{result.label}: was computed or published with code that is in no commit")
        with open_run(result) as run:
            _say(f"{result.label}: compare {len(record.files):,} files with their hashes")
            verdict.problems += check_files(result, record, run)
            config = load_settings(result)
            with with_test_images(result.root, run) as complete:
                problems = _verify_run(verdict, record, config, complete, rows, seed)
        verdict.problems += [each.replace(f"{complete}/", f"{result.label}/run/") for each in problems]
    except RRCMError as error:
        verdict.problems.append(str(error))
    verdict.seconds = time.monotonic() - start
    return verdict


def _verify_run(
    verdict: Verdict, record: ResultRecord, config: Config, run: Path, rows: int | None, seed: int
) -> list[str]:
    """What is wrong with the report, the certificates and the votes of a run. Sets the counts of `verdict`."""
    result = verdict.result
    _say(f"{result.label}: draw the report again")
    problems = _attempt(check_report, config, run, result, record)
    problems += check_run(result, record, config, run)
    counts = count_rows(config, run, config.methods)
    verdict.rows, verdict.files = sum(counts), len(counts)
    verdict.votable = sum(count_rows(config, run, record.models))
    if not verdict.votable:
        return [*problems, f"{result.label}/result.json: includes no network, so no row can be voted on again"]
    again = min(rows or verdict.votable, verdict.votable)
    spent = sum(record.stages[kind].seconds for kind in ("certify", "certify_cascade") if kind in record.stages)
    seconds = spent * again / verdict.rows
    _say(f"{result.label}: vote again on {again:,} of {verdict.votable:,} rows, in about {seconds:.0f} s as published")
    _say(f"  (--seed {seed} chooses the same rows again)")
    verdict.audits = vote_again(config, run, record.models, again, seed)
    return problems + [problem for audit in verdict.audits for problem in audit.problems]


def check_run(result: Result, record: ResultRecord, config: Config, run: Path) -> list[str]:
    """What is wrong with a run, apart from its report and from the votes of its networks.

    The stages must be those that the record names. The certificates must follow from their votes, and fit the settings,
    the networks and the test images.
    """
    problems = []
    if config.seed != result.seed:
        problems.append(f"{result.label}/params.yaml: has seed {config.seed}; restore it with git")
    problems += _attempt(check_provenance, result, record, run)
    _say(f"{result.label}: recompute every radius from its votes")
    for file in certificate_files(config, config.methods):
        problems += _attempt(check_certificates, config, run, file, file.method in record.models)
    return problems + _attempt(check_images, config, result.root, run)


def check_files(result: Result, record: ResultRecord, run: Path) -> list[str]:
    """A line for each file that is missing, changed, or not part of the result, and for a wrong hash in run.dvc."""
    hashes, problems = hash_files(result.folder, run), []
    advice = f"restore it with git, or delete {result.label}/run, which is then fetched again"
    for name in sorted(hashes.keys() | record.files):
        if name not in hashes:
            problems.append(f"{result.label}/{name}: is missing; {advice}")
        elif name not in record.files:
            problems.append(f"{result.label}/{name}: is no file of the result; delete it")
        elif hashes[name] != record.files[name]:
            problems.append(f"{result.label}/{name}: was changed: its hash is not that in result.json; {advice}")
    if not problems and folder_md5(run) != tracked_md5(result):
        problems.append(f"{result.label}/run.dvc: is of other files than run/ has; restore it with git")
    return problems


def check_provenance(result: Result, record: ResultRecord, run: Path) -> list[str]:
    """A line for each kind of stages whose entry in result.json differs from the records of the stages."""
    stages = summarize_stages({name: read_json(run / name) for name in files_below(run) if name.startswith("timings/")})
    return [
        f"{result.label}/result.json: stages.{kind} does not follow from run/timings; restore it with git"
        for kind in sorted(stages.keys() | record.stages)
        if stages.get(kind) != record.stages.get(kind)
    ]


def check_report(config: Config, run: Path, result: Result, record: ResultRecord) -> list[str]:
    """How the published report differs from one that is drawn again from the run.

    A further line says if the code has changed since the report was drawn.
    """
    with tempfile.TemporaryDirectory(prefix="rrcm_") as scratch:
        drawn = Path(scratch) / "report"
        write_report(config, run, drawn)
        problems = compare_folders(result.folder / "report", drawn, f"{result.label}/report")
    if problems and record.drawn_by is not None and changed_since(result.root, record.drawn_by.revision, "rrcm"):
        problems.append(
            f"{result.label}/report: the code has changed since commit {short(record.drawn_by.revision)} drew it; "
            f"bring it up to date with `make redraw NAME={result.name}`"
        )
    return problems


def compare_folders(published: Path, drawn: Path, label: str) -> list[str]:
    """A line for each file that is in only one of two folders, or differs by a byte. `label` names `published`."""
    problems = []
    first, second = set(files_below(published)), set(files_below(drawn))
    for name in sorted(first | second):
        if name not in first or name not in second:
            problems.append(f"{label}/{name}: {'is missing' if name not in first else 'is not drawn any more'}")
        elif (published / name).read_bytes() != (drawn / name).read_bytes():
            problems.append(f"{label}/{name}: differs when drawn again (with the versions of constraints.txt?)")
    return problems


def check_certificates(config: Config, run: Path, file: CertificateFile, included: bool) -> list[str]:
    """What is wrong with a certificate file.

    Its radii must follow from the votes. Its record must follow from the data and the settings, and from the models if
    their networks are `included`. The thresholds of a cascade must follow from the settings and the votes for
    validation images.
    """
    record, _, problems = check_file(run / file.path)
    expected = _expected_entries(config, run, config.denoised.max_images.get(file.method))
    try:
        expected |= _expected_cascade(config, run, file) if file.sigma is None else {"sigma": file.sigma}
    except RRCMError as error:
        problems.append(str(error))
    if included:
        expected["model.sha256"] = [sha256_folder(run / folder) for folder in file.models]
    entries = _flat(record)
    return problems + [
        f"{file.record}: {key} is {entries.get(key)!r}, by settings, model and data it is {value!r}"
        for key, value in expected.items()
        if entries.get(key) != value
    ]


def _expected_entries(config: Config, run: Path, max_images: int | None) -> dict[str, object]:
    """The entries that a record must have according to the settings and the data."""
    settings = config.certify
    return {
        "seed": config.seed,
        "image_size": config.data.image_size,
        "data.sha256": ShardedDataset(run / SHARDS, "test").fingerprint,
        "data.split": "test",
        "data.every": settings.every,
        "data.max_images": [settings.max_images, max_images],
    } | settings.rule


def _expected_cascade(config: Config, run: Path, file: CertificateFile) -> dict[str, object]:
    """The entries that only the record of a cascade has. Raises `RRCMError` for impossible votes for thresholds."""
    tables, sigmas = cascade_tables(config, file.method), config.cascade_sigmas
    rule = next(rule for rule, table in tables.items() if table == file.path)
    thresholds, chosen = config.cascade.thresholds, None
    if thresholds == "chosen":
        path, images = run / threshold_votes(file.method), ShardedDataset(run / SHARDS, "test")
        states = read_votes_table(path, sigmas, config.cascade.choose_n)
        if problem := are_of_other_images(states, images.manifest.splits["val"].counts):
            raise RRCMError(f"{path}: {problem}")
        thresholds, chosen = choose_by_votes(states, config, len(images.classes))
    return {"sigmas": sigmas, "certificates": rule, "thresholds": list(thresholds), "chosen": chosen}


def _flat(record: CertificateRecord | CascadeRecord) -> dict[str, object]:
    """The entries of a record, with names such as data.sha256 for its section on data, and the hashes of its models."""
    values = record.model_dump()
    data = {f"data.{key}": value for key, value in values["data"].items()}
    return values | data | {"model.sha256": [model.sha256 for model in record.models]}


def check_images(config: Config, root: Path, run: Path) -> list[str]:
    """How the published test images differ from the data set on this machine.

    The digits are on every machine. Other data sets are compared if the working copy has their shards. If it has none,
    a note says so.
    """
    if config.data.source == "digits":
        with tempfile.TemporaryDirectory(prefix="rrcm_") as scratch:
            write_shards(config.data, config.seed, Path(scratch) / "shards")
            return compare_images(run / SHARDS, Path(scratch) / "shards")
    if (root / MANIFEST).exists() and _same_kind(root, run):
        return compare_images(run / SHARDS, root / SHARDS)
    _say(f"note: {config.data.source} has no shards here, so the published test images were not compared with it")
    return []


def _same_kind(root: Path, run: Path) -> bool:
    """Whether the shards of the working copy have the same data set and image size."""
    return all(
        read_json(root / MANIFEST).get(key) == read_json(run / MANIFEST)[key]
        for key in ("source", "image_size", "channels")
    )


def compare_images(published: Path, made: Path) -> list[str]:
    """A line about the first test image whose label or pixels differ between two shard folders."""
    one, other = (ShardedDataset(folder, "test") for folder in (published, made))
    if len(one) != len(other):
        return [f"{SHARDS}: has {len(one):,} test images, {one.manifest.source} has {len(other):,}"]
    for i in range(len(one)):
        (image, label, _), (true_image, true_label, _) = one.read(i), other.read(i)
        if label != true_label or not np.array_equal(np.asarray(image), np.asarray(true_image)):
            return [f"{SHARDS}: test image {i} differs from the one in {one.manifest.source}"]
    return []


def count_rows(config: Config, run: Path, methods: Sequence[str]) -> list[int]:
    """The number of certificates in each file of `methods`."""
    return [len(read_certificates(run / file.path)) for file in certificate_files(config, methods)]


def vote_again(config: Config, run: Path, methods: Sequence[str], rows: int, seed: int) -> list[Audit]:
    """Audit `rows` certificates of `methods`, drawn at random from all files. The audits share FALSE_ALARM."""
    counts = count_rows(config, run, methods)
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(counts, rows).tolist()
    chosen = [pair for pair in zip(certificate_files(config, methods), drawn, strict=True) if pair[1]]
    audits = []
    for file, count in chosen:
        models = [run / folder for folder in file.models]
        chance = {
            "seed": random.Random(f"{seed} {file.key}").randrange(2**31),
            "false_alarm": FALSE_ALARM / len(chosen),
        }
        try:
            audits.append(audit_file(run / file.path, models, run / SHARDS, rows=count, **chance))
        except RRCMError as error:
            audits.append(Audit([str(error)], count))
    return audits


def check_repository(root: Path) -> list[str]:
    """What is wrong with the repository as a whole: uncommitted files, and the README's table.

    An archive without git has no uncommitted files.
    """
    changed = uncommitted(root, *WATCHED) or []
    return [f"{name}: is not committed; commit it, or restore it with git" for name in changed] + check_readme(root)


def describe_tree(root: Path) -> str:
    """The commit of the code that verifies, and whether any file differs from it."""
    changed = uncommitted(root, *WATCHED)
    return "without git" if changed is None else f"{short(head(root))} ({'dirty' if changed else 'clean'})"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _attempt(check: Callable[..., list[str]], *arguments: object) -> list[str]:
    """The problems that a check finds. If it cannot continue, the reason is its only problem."""
    try:
        return check(*arguments)
    except RRCMError as error:
        return [str(error)]
