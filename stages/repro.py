"""Run the pipeline, independent stages at the same time: `make repro`. This is not a DVC stage.

rrcm/utils/scheduler.py decides which stage starts when. Each stage runs as
`dvc --wait-for-lock repro --single-item STAGE` (pipeline.py), so DVC alone decides whether to run it, restore it from
its cache or skip it, and DVC records it in dvc.lock. `dvc repro` does the same, one stage after another.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pipeline import lockfile_copied, read_graph, read_outcome, run_stage, sort_lockfile
from warm import WarmScheduler as Scheduler  # or, without warm.py: from rrcm.utils.scheduler import Scheduler

from rrcm.utils.errors import RRCMError
from rrcm.utils.files import lock_file, writing
from rrcm.utils.provenance import available_cores
from rrcm.utils.scheduler import RAN, RESTORED, UNCHANGED, default_jobs, visible_gpus


def repro(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages to bring up to date; default: all.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Stages at once; default: one per GPU or core.")] = None,
) -> None:
    """Bring TARGETS and everything they depend on up to date. Continues where a killed run stopped."""
    start = time.monotonic()
    logs = Path(os.environ.get("RRCM_RUNS") or "runs").absolute() / "logs"
    with writing(logs, "or set RRCM_RUNS to another folder"):
        logs.mkdir(parents=True, exist_ok=True)
    with only_run(logs / "lock"), lockfile_copied(logs / "dvc.lock"):
        stages, gpus = read_graph(targets or []), visible_gpus()
        jobs = jobs or usual_jobs(gpus)
        print(f"{len(stages)} stages, {jobs} at once; logs are in {os.path.relpath(logs)}/", file=sys.stderr)
        Scheduler(stages, jobs, gpus, logs, run_stage, read_outcome).run()
        if not targets:  # even if nothing ran, because an earlier run may have been killed just before this
            sort_lockfile(stages)
    if not targets:
        print_results()
    counts = [f"{sum(stage.outcome == kind for stage in stages)} {kind}" for kind in (RAN, RESTORED, UNCHANGED)]
    print(f"done in {time.monotonic() - start:.0f} s: {', '.join(counts)}", file=sys.stderr)


def usual_jobs(gpus: list[str]) -> int:
    """Stages to run at once, by the number of threads that params.yaml or OMP_NUM_THREADS gives each stage."""
    in_environment = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # OpenMP allows one number per level
    return default_jobs(gpus, available_cores(), read_params().get("threads"), in_environment)


@contextlib.contextmanager
def only_run(path: Path) -> Iterator[None]:
    """Hold a lock, so that only one scheduler at a time works in this repository."""
    with writing(path, "or set RRCM_RUNS to another folder"):
        file = path.open("w")
    with file:
        if not lock_file(file, unprotected="start no second `make repro`, and after a kill wait for its stages to end"):
            print("another run is at work here, or just ending; waiting for it", file=sys.stderr)
            lock_file(file, wait=True)
        yield


def read_params() -> dict:
    """The settings in params.yaml, unchecked; none if the file is missing or damaged, which the stages report."""
    try:
        settings = yaml.safe_load(Path("params.yaml").read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        settings = None
    return settings if isinstance(settings, dict) else {}


def print_results() -> None:
    """Print the report's table of the best sigma, and how it differs from published figures."""
    from rrcm.publication.compare import compare_with_published  # imports pandas

    report = Path("reports") / str(read_params().get("report", {}).get("name"))
    if not report.is_dir():
        return
    print(f"\n{(report / 'best_sigma.md').read_text(encoding='utf-8')}")
    print(f"The report: {report}/index.html, or as text report.md")
    try:
        comparison = compare_with_published(Path())
    except RRCMError as error:
        comparison = f"note: not compared with published results ({error})"
    if comparison:
        print(f"\n{comparison}")


if __name__ == "__main__":
    run_command(repro)
