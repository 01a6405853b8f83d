"""The folder of a published result, the files in it, and its record result.json.

A published result is the run of one seed, in results/NAME/seed_S:

    result.json   the record that this module describes, with the hash of every other file
    params.yaml   the settings
    report/       the report; git tracks it and the two files above
    run/          the inputs of the report, models and test images, with the paths of a working copy; DVC tracks it
    run.dvc       the hash of run/ for DVC
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rrcm.certification.record import record_path
from rrcm.config import Config, explain
from rrcm.methods import METHODS
from rrcm.report.cascade_inputs import cascade_tables
from rrcm.report.inputs import certificates_file, model_folder
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import read_json, sha256_file
from rrcm.utils.provenance import Environment, Git

RESULTS = "results"
UNHASHED = {"result.json", "run.dvc", ".gitignore"}  # the record itself, and the files that DVC writes
NAME = re.compile(r"^[a-z0-9_]+$")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="forbid")


class StageRecord(_Strict):
    """All stages of one kind together."""

    seconds: Annotated[float, Field(ge=0)]  # the sum over the stages
    precisions: list[str]  # of the networks, if the stages record it
    environments: list[Environment]  # without duplicates: commit, machine and packages

    @property
    def commits(self) -> list[str]:
        """Every commit that these stages ran from, abbreviated."""
        return sorted({short(each.git.revision) for each in self.environments if each.git is not None})

    @property
    def is_clean(self) -> bool:
        """Whether all of these stages ran from the code of a commit."""
        return all(each.git is not None and not each.git.dirty for each in self.environments)


class RedrawRecord(_Strict):
    """How a result was brought up to date after its publication."""

    code: Git  # the code that drew the report
    added: dict[
        str, Any
    ] = {}  # settings that the run did not have, by name, with the values that stand for its behaviour
    removed: dict[str, Any] = {}  # settings that the run had, by name, with their values


class ResultRecord(_Strict):
    """result.json."""

    format: Literal["rrcm-result-1"]
    name: Annotated[str, Field(pattern=NAME.pattern)]
    seed: int
    models: list[str]  # the methods whose networks are included; other methods have only config.json and history.csv
    code: Git | None  # the code that published the result; None outside a git checkout
    redrawn: RedrawRecord | None = None  # None: the report is as it was published
    stages: dict[str, StageRecord]  # by kind, as in timings/
    files: dict[str, Sha256]  # by the path below the folder of the result

    @property
    def is_clean(self) -> bool:
        """Whether the result was computed, published and redrawn with the code of a commit."""
        clean = self.drawn_by is not None and not self.code.dirty and not self.drawn_by.dirty
        return clean and all(stage.is_clean for stage in self.stages.values())

    @property
    def drawn_by(self) -> Git | None:
        """The code that drew the report and wrote the settings. None outside a git checkout."""
        return self.code if self.redrawn is None else self.redrawn.code

    @property
    def commits(self) -> list[str]:
        """Every commit that the stages ran from, abbreviated."""
        return sorted({commit for stage in self.stages.values() for commit in stage.commits})


class Result(NamedTuple):
    """A published result by its name and training seed."""

    root: Path  # of the repository
    name: str
    seed: int

    @property
    def label(self) -> str:
        """The folder of the result, relative to the root of the repository."""
        return f"{RESULTS}/{self.name}/seed_{self.seed}"

    @property
    def folder(self) -> Path:
        """The folder of the result."""
        return self.root / self.label

    def read(self) -> ResultRecord:
        """The record of the result. Raises `RRCMError` if it is invalid, or belongs to another result."""
        path = self.folder / "result.json"
        try:
            record = ResultRecord.model_validate(read_json(path))
        except ValidationError as error:
            raise RRCMError(f"{path}: {explain(error, ResultRecord)}; restore it with git, or publish again") from None
        if (record.name, record.seed) != (self.name, self.seed):
            raise RRCMError(f"{path}: is of {record.name}, seed {record.seed}; restore it with git, or publish again")
        return record


def find_results(root: Path, names: Sequence[str] = ()) -> list[Result]:
    """The published results with these names, or all, in the order of names and seeds.

    Raises `RRCMError` for a name that is not published.
    """
    seeds = {}
    for path in (root / RESULTS).glob("*/seed_*"):
        seed = path.name.removeprefix("seed_")
        if path.is_dir() and seed.isdigit():
            seeds.setdefault(path.parent.name, []).append(int(seed))
    for name in names:
        if name not in seeds:
            known = f"published are {', '.join(sorted(seeds))}" if seeds else "nothing is published yet"
            raise RRCMError(f"{RESULTS}/{printable(name)}: no such result; {known}")
    return [Result(root, name, seed) for name in sorted(names or seeds) for seed in sorted(seeds[name])]


def hash_files(folder: Path, run: Path | None = None) -> dict[str, str]:
    """SHA-256 of every file of a result except UNHASHED, by its path below `folder`. `run` replaces folder/run."""
    run = run or folder / "run"
    paths = {name: folder / name for name in files_below(folder) if name not in UNHASHED and name[:4] != "run/"}
    paths |= {f"run/{name}": run / name for name in files_below(run)}
    return {name: sha256_file(path) for name, path in sorted(paths.items())}


def files_below(folder: Path) -> list[str]:
    """The relative paths of all files in a folder and below, without the temporary files of killed processes."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.relative_to(folder).as_posix()
        for path in paths
        if not (path.name.startswith(".") and path.name.endswith(".tmp"))
    )


def summarize_stages(timings: Mapping[str, Mapping]) -> dict[str, StageRecord]:
    """The stages by kind. `timings` are their records by path, such as timings/finetune/rrcm/sigma_0.5.json."""
    kinds: dict[str, list[Mapping]] = {}
    for path, timing in sorted(timings.items()):
        kinds.setdefault(Path(path).parts[1].removesuffix(".json"), []).append(timing)
    return {
        kind: StageRecord(
            seconds=sum(timing.get("seconds", 0.0) for timing in of_kind),
            precisions=sorted({timing["dtype"] for timing in of_kind if "dtype" in timing}),
            environments=_distinct([Environment.model_validate(timing["environment"]) for timing in of_kind]),
        )
        for kind, of_kind in kinds.items()
    }


def model_runs(config: Config, methods: Iterable[str]) -> list[tuple[str, float]]:
    """(method, sigma) of each certified model of `methods`, in the order of the settings."""
    chosen = set(methods)
    return [(method, sigma) for method in config.methods if method in chosen for sigma in config.sigmas]


class CertificateFile(NamedTuple):
    """A certificate file of a run, and the models that voted for it. Paths are relative to the root."""

    method: str
    sigma: float | None  # pixel units; None: a cascade
    path: str
    models: list[str]  # folders: one for all sigmas, or one for each

    @property
    def key(self) -> tuple[str, float | str]:
        """The method and the sigma, or the method and the name of a cascade's file."""
        return self.method, Path(self.path).stem if self.sigma is None else self.sigma

    @property
    def record(self) -> str:
        """The record beside it."""
        return record_path(Path(self.path)).as_posix()


def certificate_files(config: Config, methods: Iterable[str]) -> list[CertificateFile]:
    """The certificate files of `methods`: first single sigmas in the order of the settings, then cascades."""
    chosen = set(methods)
    files = [CertificateFile(*run, certificates_file(*run), [model_folder(*run)]) for run in model_runs(config, chosen)]
    for method in config.cascade.methods:
        if method in chosen:
            models = list(dict.fromkeys(model_folder(method, sigma) for sigma in config.cascade_sigmas))
            tables = cascade_tables(config, method).values()
            files += [CertificateFile(method, None, table, models) for table in tables]
    return files


def check_methods(config: Config, methods: Sequence[str] | None) -> list[str]:
    """The methods of a run that `methods` names, or all. Raises `RRCMError` for a method that the run does not have."""
    for name in methods or ():
        if name not in config.methods:
            known = f"the run has {', '.join(config.methods)}"
            raise RRCMError(f"{printable(name)}: {'is not in this run' if name in METHODS else 'no method'}; {known}")
    return [name for name in config.methods if methods is None or name in methods]


def short(revision: str | None) -> str:
    """A commit, abbreviated."""
    return "no commit" if revision is None else revision[:7]


def _distinct(environments: Sequence[Environment]) -> list[Environment]:
    return [environment for i, environment in enumerate(environments) if environment not in environments[:i]]
