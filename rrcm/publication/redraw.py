"""Bring a published result up to date with the code: its settings and its report, without computing anything again.

The run stays as it is, except that networks can be left out. It must pass every check of verify.py that needs no
network. result.json keeps the commits that computed the run, and also names the commit that drew the report.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rrcm.config import Config, parse_config, read_settings
from rrcm.publication.freeze import CODE, keep, run_files, with_test_images
from rrcm.publication.objects import delete_unnamed, list_objects, open_run, write_tracked
from rrcm.publication.result import (
    RESULTS,
    RedrawRecord,
    Result,
    ResultRecord,
    check_methods,
    files_below,
    hash_files,
)
from rrcm.publication.settings import Update, covers, read_defaults, settings_text, update_settings
from rrcm.publication.verify import check_files, check_run, compare_folders
from rrcm.report.build import write_report
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory, finish_swap, write_json, write_text
from rrcm.utils.provenance import Git, head, uncommitted

ComposeToday = Callable[[str], Mapping]  # the settings of a profile by its name, as conf/ has them


def redraw(
    result: Result, compose_today: ComposeToday, confirmed: Sequence[str] = (), methods: Sequence[str] | None = None
) -> Update | None:
    """Replace the settings and the report of a published result; returns the change of its settings.

    None means that it was up to date. `confirmed` are as in `update_settings`. With `methods`, only their networks
    stay, and only files that a publication includes today. The folder is replaced as a whole, so that a killed process
    leaves the old or the new one. Raises `RRCMError` for uncommitted code, for a run that differs from its hashes or
    fails a check, and for settings that may have decided what the run computed.
    """
    check_committed(result.root)
    record = result.read()
    with ExitStack() as stack:
        run = stack.enter_context(open_run(result))
        _refuse(check_files(result, record, run))
        update = _update(result, record, compose_today, confirmed)
        config = parse_config(update.values, f"{result.label}/params.yaml")
        models = record.models if methods is None else check_included(config, record, methods)
        complete = stack.enter_context(with_test_images(result.root, run))
        problems = check_run(result, record, config, complete)
        _refuse([each.replace(f"{complete}/", f"{result.label}/run/") for each in problems])
        report = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rrcm_"))) / "report"
        write_report(config, complete, report)
        text = settings_text(update.values)
        published = set(files_below(run))
        kept = published if methods is None else published & run_files(config, complete, models)
        names = None if kept == published else kept
        is_current = text == (result.folder / "params.yaml").read_text(encoding="utf-8")
        if is_current and not compare_folders(result.folder / "report", report, "") and names is None:
            if methods is not None and (result.folder / "run").is_dir():
                keep(result)  # a killed redraw may have left this out
            return None
        draft = record.model_copy(update={"models": models, "redrawn": _describe(record, result.root, update)})
        objects = list_objects(result)
        with atomic_directory(result.folder) as folder:
            _write(result, folder, run, names)
            shutil.copytree(report, folder / "report")
            write_text(folder / "params.yaml", text)
            hashes = hash_files(folder, run if names is None else None)
            write_json(folder / "result.json", draft.model_copy(update={"files": hashes}).model_dump(mode="json"))
    if names is not None:
        keep(result)
        delete_unnamed(result.root, objects)
    return update


def finish_killed(root: Path) -> None:
    """Complete the results whose folders were being swapped when a process was killed."""
    for ready in sorted((root / RESULTS).glob("*/.seed_*.ready.tmp")):
        finish_swap(ready.with_name(ready.name.removeprefix(".").removesuffix(".ready.tmp")))


def check_committed(root: Path) -> None:
    """Raise `RRCMError` unless the code is committed, so that result.json can name the commit."""
    changed = uncommitted(root, *CODE)
    if changed is None:
        raise RRCMError("this is no git checkout, so no commit can be named; redraw in one")
    if changed:
        raise RRCMError(f"{', '.join(changed[:5])}: not committed; commit, and redraw then")


def check_included(config: Config, record: ResultRecord, methods: Sequence[str]) -> list[str]:
    """The methods in the order of the settings. Raises `RRCMError` for one whose networks are not included."""
    chosen = check_methods(config, methods)
    if lacking := [name for name in chosen if name not in record.models]:
        raise RRCMError(f"{lacking[0]}: its networks are not in {record.name}, which has {', '.join(record.models)}")
    return chosen


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RRCMError(f"{problems[0]}{more}")


def _update(result: Result, record: ResultRecord, compose_today: ComposeToday, confirmed: Sequence[str]) -> Update:
    path = result.folder / "params.yaml"
    values = read_settings(path)
    profile = str(values.get("profile"))
    written_by = None if record.drawn_by is None else record.drawn_by.revision
    earlier = record.redrawn.added if record.redrawn is not None else {}
    confirmed = [name for name in confirmed if not covers(earlier, name)]
    defaults = read_defaults(result.root, written_by, profile)
    try:
        return update_settings(values, compose_today(profile), confirmed, defaults)
    except RRCMError as error:
        raise RRCMError(f"{result.label}/params.yaml: {error}") from None


def _describe(record: ResultRecord, root: Path, update: Update) -> RedrawRecord:
    """The entry of result.json that sums up every time that the result was redrawn."""
    before = record.redrawn
    added, removed = (before.added, before.removed) if before is not None else ({}, {})
    return RedrawRecord(
        code=Git(revision=head(root), dirty=False),
        added={name: value for name, value in (added | update.added).items() if name not in update.removed},
        removed=removed | {name: value for name, value in update.removed.items() if name not in added},
    )


def _write(result: Result, folder: Path, run: Path, names: set[str] | None) -> None:
    """Copy the run, or only its files `names`, and the DVC files to the new `folder` of the result."""
    for name in ("run.dvc", ".gitignore"):
        if (result.folder / name).exists():
            shutil.copyfile(result.folder / name, folder / name)
    if names is None:
        if (result.folder / "run").is_dir():
            shutil.copytree(run, folder / "run")
        return
    for name in sorted(names):
        (folder / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, folder / "run" / name)
    write_tracked(folder)
