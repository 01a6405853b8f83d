"""Publish a finished run: freeze it below results/, and let DVC keep what is too large for git."""

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

from rrcm.certification.flips import measure_flips
from rrcm.certification.record import read_record, record_bytes, record_path
from rrcm.config import Config, load_config
from rrcm.data.shards import ShardedDataset
from rrcm.methods import THRESHOLDS
from rrcm.publication.objects import dvc_error, run_dvc
from rrcm.publication.result import (
    NAME,
    Result,
    ResultRecord,
    certificate_files,
    check_methods,
    files_below,
    hash_files,
    model_runs,
    summarize_stages,
)
from rrcm.report.build import write_report
from rrcm.report.inputs import MANIFEST, SHARDS, model_folder, read_inputs
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import atomic_directory, read_json, write_json
from rrcm.utils.progress import Progress
from rrcm.utils.provenance import Git, available_cores, head, uncommitted

CODE = ("rrcm", "stages", "conf", "dvc.yaml")  # all that a run depends on, except the settings that it publishes
MAX_TEST_BYTES = 32 * 2**20  # a larger test split is not published; to verify the result, make it with shard-data


def publish(
    root: Path, name: str | None, methods: Sequence[str] | None = None, *, replace: bool = False, dirty: bool = False
) -> Result:
    """Freeze the run of the repository `root` as results/NAME/seed_S, and add it to DVC and its remote.

    The default of `name` is the name of the report. The networks of `methods` are included, by default of all methods.
    Unless `dirty` is given, the code must be the code of a commit, now and in every stage of the run. Raises
    `RRCMError` for an unfinished run, and for a published one unless `replace` is given.
    """
    config = load_config(root / "params.yaml")
    if config.certify.precision == "int8":
        reason = "`make verify` has no validation images, with which networks in int8 are made again"
        raise RRCMError(f"certify.precision int8: cannot be published, as {reason}; certify in another precision")
    result = Result(root, name or config.report.name, config.seed)
    if not NAME.fullmatch(result.name):
        raise RRCMError(
            f"{printable(result.name)}: must be letters a to z, digits and underscores; choose another NAME"
        )
    included = check_methods(config, methods)
    if (result.folder / "result.json").exists() and not replace:
        raise RRCMError(f"{result.label}: is published already; choose another NAME, or replace it with --replace")
    if unfinished := find_unfinished(root):
        shown = "; ".join(unfinished[:3]) + ("; ..." if unfinished[3:] else "")
        raise RRCMError(
            f"the run is not finished, {len(unfinished)} stages are not up to date: {shown}; run `make repro`"
        )
    changed = uncommitted(root, *CODE)
    if not dirty and changed is None:
        raise RRCMError("this is no git checkout, so no commit can be named; publish from one, or with --dirty")
    if not dirty and changed:
        raise RRCMError(
            f"{', '.join(changed[:5])}: not committed; commit, or publish with --dirty, which verify refuses"
        )
    draft = describe_run(config, root, result, included, None if changed is None else bool(changed))
    if not dirty and not draft.is_clean:
        kinds = ", ".join(kind for kind, stage in draft.stages.items() if not stage.is_clean)
        raise RRCMError(f"{kinds}: ran from code that was not committed; run them again, or publish with --dirty")
    with atomic_directory(result.folder) as folder:
        freeze(config, root, folder, draft)
    keep(result)
    return result


def describe_run(
    config: Config, root: Path, result: Result, methods: Sequence[str], dirty: bool | None
) -> ResultRecord:
    """The record of a result before its files exist. `dirty`: the code is in no commit; None without git."""
    timings = [path for path in read_inputs(config, root).files if path.startswith("timings/")]
    return ResultRecord(
        format="rrcm-result-1",
        name=result.name,
        seed=config.seed,
        models=list(methods),
        code=None if dirty is None else Git(revision=head(root), dirty=dirty),
        stages=summarize_stages({path: read_json(root / path) for path in timings}),
        files={},
    )


def freeze(config: Config, root: Path, folder: Path, draft: ResultRecord) -> None:
    """Write all files of a published result, except the files that DVC writes, to the empty `folder`.

    The report is drawn again from the frozen files, which shows that they suffice. `draft` is the record without the
    hashes.
    """
    for path in sorted(run_files(config, root, draft.models)):
        (folder / "run" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, folder / "run" / path)
    add_flips(config, folder / "run", root / SHARDS, draft.models)
    shutil.copyfile(root / "params.yaml", folder / "params.yaml")
    with with_test_images(root, folder / "run") as complete:
        write_report(config, complete, folder / "report")
    record = draft.model_copy(update={"files": hash_files(folder)})
    write_json(folder / "result.json", record.model_dump(mode="json"))


def run_files(config: Config, root: Path, methods: Sequence[str]) -> set[str]:
    """Every file of a run that is published, relative to `root`.

    These are the inputs of the report, the record beside each certificate file, the votes from which the thresholds of
    cascades were chosen, the networks of `methods` with all their parts, and the test images if they are small.
    """
    files = set(read_inputs(config, root).files)
    files |= {file.record for file in certificate_files(config, config.methods)}
    files |= {threshold_votes(method) for method in config.cascade.methods if config.cascade.thresholds == "chosen"}
    for method, sigma in model_runs(config, methods):
        files |= _model_files(root, model_folder(method, sigma))
    test = ShardedDataset(root / SHARDS, "test").split
    entries = [test.index, *test.shards]
    if sum(entry.bytes for entry in entries) <= MAX_TEST_BYTES:
        files |= {f"{SHARDS}/{entry.name}" for entry in entries}
    else:
        print(f"note: the test images are too large to be published; {MANIFEST} names them", file=sys.stderr)
    return files


@contextmanager
def with_test_images(root: Path, run: Path) -> Iterator[Path]:
    """`run` itself, or a folder with its files and the test images of the working copy if `run` has no test images.

    Test images that are too large are not published. Raises `RRCMError` if the working copy has none, or other ones.
    """
    if (run / SHARDS / "test.index.npy").exists():
        yield run
        return
    if not (root / MANIFEST).exists() or read_json(root / MANIFEST) != read_json(run / MANIFEST):
        problem = "are not published and not here" if not (root / MANIFEST).exists() else "are others here"
        raise RRCMError(f"{MANIFEST}: its test images {problem}; make them with `dvc repro shard-data`")
    with tempfile.TemporaryDirectory(prefix="rrcm_") as scratch:
        for entry in run.iterdir():
            if entry.name != "data":
                (Path(scratch) / entry.name).symlink_to(entry.absolute())
        (Path(scratch) / "data").mkdir()
        (Path(scratch) / SHARDS).symlink_to((root / SHARDS).absolute())
        yield Path(scratch)


def threshold_votes(method: str) -> str:
    """The files of votes from which the thresholds of a method's cascade were chosen, relative to the root."""
    return f"certificates/{method}/{THRESHOLDS}.tsv"


def _model_files(root: Path, folder: str) -> set[str]:
    """Every file of a model folder, and of the models that it consists of."""
    files = {f"{folder}/{name}" for name in files_below(root / folder)}
    for path in _part_paths(read_json(root / folder / "config.json")):
        part = os.path.normpath(f"{folder}/{path}")
        if not part.startswith("models/"):
            raise RRCMError(f"{folder}: its part {part} lies outside models/; publish it without, with --models")
        files |= _model_files(root, part)
    return files


def _part_paths(config: Mapping) -> Iterator[str]:
    """The folders of a model's parts relative to the model: members of an ensemble, or a denoiser and a classifier.

    An external part has a name and no path.
    """
    for part in [*config.get("members", []), *config.get("parts", {}).values()]:
        if "path" in part:
            yield part["path"]


def add_flips(config: Config, run: Path, shards: Path, methods: Sequence[str]) -> None:
    """Add to the record of each certificate file how often predictions flip on a machine that rounds differently.

    An audit on another machine uses this rate as its tolerance.
    """
    files = certificate_files(config, methods)
    models = [[run / model for model in file.models] for file in files]
    certificates = [run / file.path for file in files]
    workers = ProcessPoolExecutor(available_cores(), mp_context=multiprocessing.get_context("spawn"))
    with workers, Progress(len(files), "measure how often answers flip", "files") as progress:
        measured = workers.map(measure_flips, certificates, models, repeat(shards))
        for path, flips in zip(certificates, measured, strict=True):
            record = read_record(record_path(path)).model_copy(update={"flips": flips})
            record_path(path).write_bytes(record_bytes(record))
            progress.update()


def find_unfinished(root: Path) -> list[str]:
    """The stages of dvc.yaml that are not up to date, each with its changes."""
    answer = run_dvc(root, "status", "--json", "dvc.yaml")
    if answer.returncode != 0:
        raise RRCMError(f"DVC cannot say whether the run is finished ({dvc_error(answer)}); see `dvc status`")
    return [f"{stage} ({_changes_text(changes)})" for stage, changes in json.loads(answer.stdout).items()]


def _changes_text(changes: Sequence[str | Mapping[str, Mapping[str, str]]]) -> str:
    """The changes of a stage, as DVC reports them, in one line such as "changed deps: data/shards"."""
    return ", ".join(
        each if isinstance(each, str) else "; ".join(f"{kind}: {', '.join(paths)}" for kind, paths in each.items())
        for each in changes
    )


def keep(result: Result) -> None:
    """Let DVC track the run of a result, and push it to the default remote."""
    for command in (["add", "--quiet", f"{result.label}/run"], ["push", "--quiet", f"{result.label}/run.dvc"]):
        answer = run_dvc(result.root, *command)
        if answer.returncode != 0:
            problem, again = dvc_error(answer), f"`dvc {' '.join(command)}`"
            raise RRCMError(f"{result.label}: is written, but DVC cannot keep it ({problem}); then run {again}")
