"""Is anything lost when processes are killed? Sends SIGKILL at random times to all stages and to `rrcm certify`.

The commands first run undisturbed, at smoke size in a temporary folder. Then each command runs in a copy of that
folder, where it and its children are killed and it is restarted until it finishes, in many rounds. For half of the
starts its outputs are deleted first, as DVC does. The times are drawn uniformly from the duration of an undisturbed
run, including imports and publishing. Every fourth kill hits a new interpreter. The others hit a fork of a process that
has already done the imports.

A fifth of the kills targets the whole pipeline under `stages/repro.py`: the scheduler alone, one DVC process, the
command of one stage, or all processes.

Something is lost if a run cannot be continued, if a kill leaves a partial output, or if a finished run leaves anything
but the undisturbed result: other bytes, saved state, locks, journals, temporary files or processes. Measured seconds
are not compared. Do not edit the code meanwhile, since a run only continues under the same code.

    python benchmarks/kills.py
    python benchmarks/kills.py --kills 20 --only finetune --only "rrcm certify"
"""

import contextlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

from rrcm.utils.app import exit_on_error, make_app, resume_gc

# isort: split
import psutil
import typer
import yaml
from dvc.utils.hydra import compose_and_dump
from tabulate import tabulate

from rrcm.data.shards import ShardedDataset
from rrcm.utils.errors import RRCMError
from rrcm.utils.progress import Progress

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS = """sigmas=[0.5] methods=[rrcm] attack.methods=[rrcm]
    model.patch_size=4 model.embed_dim=32 model.num_heads=2 model.projector_hidden_dim=32 model.projection_dim=16
    pretrain.batch_size=64 pretrain.steps=30 pretrain.warmup_steps=4 pretrain.precision=fp32 pretrain.log_every=3
    pretrain.evaluate_every=10 pretrain.checkpoint_every=5
    finetune.epochs=6 finetune.precision=fp32 finetune.checkpoint_every=1
    certify.batch_size=200 certify.every=5 latency.seconds=0.1
    attack.steps=5 attack.num_noise=4 attack.n=200 attack.max_images=20"""
IMAGES = 40  # for `rrcm certify`
PIPELINE_SHARE = 0.2  # of the kills
FEW = 4  # minimum kills of each command, if there are enough
COLD_EVERY = 4  # every fourth kill hits a new interpreter
LONGEST = 300  # seconds; longer than anything here should take
SHOWN = 10  # lines about one command
TIMED = ("timings/",)  # JSON files with seconds
LATENCY = "timings/latency.json"
# What the pipeline's own repository copies from this one, and what git and DVC keep there for themselves.
CODE = ("conf", "dvc.yaml", "external", "rrcm", "stages", ".dvc/config", ".dvcignore", ".gitignore")
INTERNAL = (".git/", ".dvc/cache/", ".dvc/tmp/", "runs/logs/")
PRELOAD = """rrcm.training.pretrain rrcm.training.finetune rrcm.certification.certify rrcm.evaluation.latency
    rrcm.evaluation.attack rrcm.report.build rrcm.data.sharding rrcm.certification.certify_images rrcm.models.load
    rrcm.report.certified_images torch._dynamo webdataset sklearn.datasets timm hydra dvclive psutil dvc.api dvc.cli
    dvc.commands.repro dvc.repo.reproduce dvc.stage.run dvc.utils.hydra"""

Contents = Mapping[str, object]  # what must be equal in a folder, by relative path; None for a subfolder
server = multiprocessing.get_context("forkserver")


class Command(NamedTuple):
    """A stage, `rrcm certify`, or the pipeline."""

    name: str
    words: list[str]  # a file of stages/ or `rrcm`, then arguments
    outputs: list[str]  # files and folders that only appear complete, relative to where it runs
    live: list[str] = []  # noqa: RUF012 - folders that grow


MODEL = "rrcm/sigma_0.5"
STAGES = [  # each comes after the stages that it needs
    Command("shard-data", ["shard_data.py"], ["data/shards"]),
    Command(
        "pretrain", ["pretrain.py"], ["models/pretrain/rrcm", "timings/pretrain/rrcm.json"], ["dvclive/pretrain-rrcm"]
    ),
    Command(
        "finetune",
        ["finetune.py", "rrcm", "0.5"],
        [f"models/{MODEL}", f"timings/finetune/{MODEL}.json"],
        ["dvclive/finetune-rrcm-sigma-0.5"],
    ),
    Command(
        "certify",
        ["certify.py", "rrcm", "0.5"],
        [
            f"certificates/{MODEL}.tsv",
            f"certificates/{MODEL}.samples.tsv",
            f"certificates/{MODEL}.json",
            f"timings/certify/{MODEL}.json",
        ],
    ),
    Command("latency", ["latency.py"], [LATENCY]),
    Command("attack", ["attack.py", "rrcm"], ["attack/rrcm"]),
    Command("fingerprint", ["fingerprint.py"], ["fingerprints"]),
    Command("plot", ["plot.py"], ["reports/digits", "metrics.json"]),
    Command(
        "rrcm certify",
        f"rrcm certify images --model models/{MODEL} --n 1000 --output found/of.tsv --gallery found/of.png".split(),
        ["found/of.tsv", "found/of.files.tsv", "found/of.png"],
    ),
]
RESULTS = ["fingerprints", "metrics.json", "data", "models", "certificates", "timings", "attack", "dvclive"]
PIPELINE = Command(
    "repro.py",
    ["repro.py", "--jobs", "2"],
    [],
    [*RESULTS, "reports", "runs", "dvc.lock", ".dvc/cache", ".dvc/tmp"],  # DVC puts outputs back file by file
)


# Processes


def _become(words: list[str], folder: Path, log: Path, cold: bool) -> None:
    """Turn this new process into the command, in a session of its own."""
    os.setsid()
    os.chdir(folder)
    cache = str(folder.parent / "cache")
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DVC_NO_ANALYTICS": "1"}
    os.environ |= {"XDG_CACHE_HOME": cache, "DVC_SITE_CACHE_DIR": cache, "PYTHONPATH": str(REPOSITORY)}
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ.pop("RRCM_RUNS", None)
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    script, *arguments = words
    path = str(REPOSITORY / "stages" / script)
    if cold:
        program = ["-m", "rrcm.cli"] if script == "rrcm" else [path]
        os.execv(sys.executable, [sys.executable, *program, *arguments])
    multiprocessing.set_start_method(None, force=True)  # the default again
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(REPOSITORY / "stages"))
    if script == "rrcm":
        runpy.run_module("rrcm.cli", run_name="__main__")
    else:
        runpy.run_path(path, run_name="__main__")


class Place:
    """A folder where commands run, one after another."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder.with_name(f"{folder.name}.log")
        self.process: multiprocessing.Process | None = None

    def start(self, command: Command, cold: bool = False) -> None:
        """Start a command, as a fork or `cold`: as a new interpreter. Its output goes to the log."""
        self.process = server.Process(target=_become, args=(command.words, self.folder, self.log, cold))
        self.process.start()

    def wait(self, seconds: float | None = None) -> int | None:
        """Exit status of the command, negative if a signal ended it; None if it still runs after `seconds`."""
        self.process.join(seconds)
        return self.process.exitcode

    def run(self, command: Command, cold: bool = False) -> float:
        """Run a command undisturbed; returns the seconds it took. Raises `RRCMError` if it fails."""
        start = time.monotonic()
        self.start(command, cold)
        try:
            if self.wait() != 0:
                raise RRCMError(f"{command.name} failed though nobody killed it: {self.last_line()} ({self.log})")
        finally:
            self.kill()
        return time.monotonic() - start

    def kill(self) -> None:
        """Kill the command and the children in its process group, and wait until it ends."""
        if self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # it is too young to have a group
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()

    def last_line(self) -> str:
        """The last line of the command's output."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it printed nothing")

    def has_state(self) -> bool:
        """Whether an unfinished run has left saved state to continue from."""
        journals = (path.stat().st_size > 1 for path in self.folder.rglob("journal-*.txt"))
        return any(journals) or any(self.folder.rglob("[0-9]*.safetensors"))

    def delete(self, paths: Collection[str]) -> None:
        """Delete files and folders, as DVC deletes the outputs of a stage that it runs."""
        for path in (self.folder / each for each in paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def survivors(self) -> list[str]:
        """A line for each process whose working directory is this folder."""
        lines = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    lines.append(f"process {process.pid} still runs: {' '.join(process.cmdline())}")
        return lines


# Comparisons


def contents(folder: Path) -> Contents:
    """Every file and folder below `folder`, except for the internal files of git and DVC."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not f"{name}/".startswith(INTERNAL) and "__pycache__" not in path.parts:
            entries[name] = None if path.is_dir() else _comparable(name, path.read_bytes())
    return entries


def _comparable(name: str, content: bytes) -> object:
    """A file's content without measured values, which differ from run to run."""
    if Path(name).name.startswith("."):  # what a killed process was writing, which may be empty
        return content
    if name.startswith(TIMED) or (name.startswith("certificates/") and name.endswith(".json")):
        counts = {"parse_int": lambda _: None} if name == LATENCY else {}  # batch sizes depend on measured times
        record = json.loads(content, parse_float=lambda _: None, **counts)
        record.get("environment", {}).pop("git", None)  # the pipeline runs in a repository of its own
        return record
    if name == "dvc.lock":
        stages = yaml.safe_load(content)["stages"]
        for entry in (entry for stage in stages.values() for entry in stage.get("deps", []) + stage.get("outs", [])):
            if f"{entry['path']}/".startswith((*TIMED, "reports/")):
                entry["md5"] = entry["size"] = None
        return list(stages.items())
    return content


def below(entries: Contents, *paths: str) -> Contents:
    """The entries that are one of `paths` or lie below it."""
    return {name: each for name, each in entries.items() if f"{name}/".startswith(tuple(f"{path}/" for path in paths))}


def differences(expected: Contents, actual: Contents) -> list[str]:
    """A line for each path that exists in only one of the two or differs."""
    lines = [f"{name} is missing" for name in sorted(expected.keys() - actual.keys())]
    lines += [f"{name} is left over" for name in sorted(actual.keys() - expected.keys())]
    common = sorted(expected.keys() & actual.keys())
    return [*lines, *(f"{name} differs" for name in common if expected[name] != actual[name])]


# Kills


@dataclass
class Tally:
    """What happened to one command."""

    kills: int = 0
    starts: int = 0
    cold: int = 0  # starts with a new interpreter
    resumed: int = 0  # starts that found saved state
    finished: int = 0
    identical: int = 0  # finished runs
    lost: list[str] = field(default_factory=list)
    victims: Counter[str] = field(default_factory=Counter)  # kills of the pipeline, by victim


class Disturbance:
    """A command that is killed repeatedly. Whenever it finishes, its folder must contain `expected`."""

    def __init__(self, command: Command, place: Place, expected: Contents, seed: int):
        self.command, self.place, self.expected = command, place, expected
        self.rng, self.tally = random.Random(f"{seed} {command.name}"), Tally()

    def run(self, kills: int, seconds: float, progress: Progress) -> Tally:
        """Kill the command `kills` times, then let it finish; stop if something is lost. A fork takes `seconds`."""
        tally, takes, unfinished = self.tally, {False: seconds}, False
        if kills >= COLD_EVERY:
            takes[True] = self.place.run(self.command, cold=True)
            tally.lost += self.check_finished()
        while not tally.lost and (tally.kills < kills or unfinished):
            self.prepare(unfinished)
            last = tally.kills == kills
            cold = not last and tally.kills % COLD_EVERY == COLD_EVERY - 1
            killed = self._start(cold, LONGEST if last else self.rng.uniform(0, takes[cold]))
            if killed and not last:
                unfinished, tally.kills = True, tally.kills + 1
                tally.lost += self.check_killed()
                progress.update(1, at=self.command.name)
            elif self.place.wait() == 0:
                unfinished, problems = False, self.check_finished()
                tally.finished, tally.identical = tally.finished + 1, tally.identical + (not problems)
                tally.lost += problems
            else:
                tally.lost.append(f"hangs or cannot be continued: {self.place.last_line()}")
        return tally

    def _start(self, cold: bool, seconds: float) -> bool:
        """Start the command; returns whether it was killed after `seconds`, before it ended by itself."""
        self.tally.starts, self.tally.cold = self.tally.starts + 1, self.tally.cold + cold
        self.tally.resumed += self.place.has_state()
        self.place.start(self.command, cold)
        try:
            return self.place.wait(seconds) is None and self.strike()
        finally:
            self.place.kill()

    def prepare(self, unfinished: bool) -> None:
        """Delete the outputs before half of the starts, chosen at random."""
        if self.rng.random() < 0.5:
            self.place.delete([*self.command.outputs, *self.command.live])

    def strike(self) -> bool:
        """Kill the command; returns whether that came before it ended by itself."""
        self.place.kill()
        return self.place.wait() != 0

    def contents(self) -> Contents:
        """The files and folders to compare."""
        return contents(self.place.folder)

    def check_killed(self) -> list[str]:
        """A line for each output that exists after a kill but is not complete."""
        left = self.contents()
        pairs = [(path, below(self.expected, path), below(left, path)) for path in self.command.outputs]
        return [f"{path} is half-written" for path, whole, there in pairs if there and there != whole]

    def check_finished(self) -> list[str]:
        """A line for each difference from the expected result of a finished command."""
        return differences(self.expected, self.contents()) + self.place.survivors()


class PipelineDisturbance(Disturbance):
    """The pipeline, of which one part or everything is killed."""

    def prepare(self, unfinished: bool) -> None:
        """Before a new round, delete everything including DVC's cache and state."""
        if not unfinished:
            self.place.delete(self.command.live)

    def strike(self) -> bool:
        """Kill a random victim; returns whether that stopped the pipeline before it ended by itself."""
        scheduler = psutil.Process(self.place.process.pid)
        victims = {"scheduler": [scheduler], "DVC": scheduler.children(), "stage": [], "all": [scheduler]}
        for child in victims["DVC"]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victims["stage"] += child.children()
                victims["all"] += [child, *child.children(recursive=True)]
        name = self.rng.choice([name for name, processes in victims.items() if processes])
        for victim in victims[name] if name == "all" else [self.rng.choice(victims[name])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        if self.place.wait(LONGEST) is None:
            self.place.kill()
            self.tally.lost.append(f"still runs {LONGEST} s after its {name} was killed")
        stopped = self.place.wait() != 0
        self.tally.victims[name] += stopped
        return stopped

    def check_killed(self) -> list[str]:
        """Checks nothing: processes may still write, and DVC detects incomplete outputs by their hash."""
        return []

    def contents(self) -> Contents:
        """The files and folders to compare, without the report, which shows measured values."""
        return {name: each for name, each in super().contents().items() if not name.startswith("reports/")}

    def check_finished(self) -> list[str]:
        """Also: drawing the report again gives the same, no locks are left, and the next run has nothing to do."""
        lines, root, drawn = super().check_finished(), self.place.folder, self.place.folder / "drawn"
        left = [path for path in (*root.glob(".git/**/*.lock"), root / "runs/logs/dvc.lock") if path.exists()]
        lines += [f"{path.relative_to(root)} is left over" for path in left]
        self.place.run(Command("plot", ["plot.py", "--reports", drawn.name], []))
        lines += [f"reports: {line}" for line in differences(contents(drawn), contents(root / "reports"))]
        self.place.delete([drawn.name])
        self.place.run(self.command)
        last = self.place.last_line()
        return lines if ": 0 ran, 0 restored" in last else [*lines, f"the next run does something: {last}"]


# The whole


def make_inputs(folder: Path) -> None:
    """A new folder with the settings of a small pipeline."""
    folder.mkdir()
    conf = REPOSITORY / "conf"
    compose_and_dump(folder / "params.yaml", str(conf), None, "config", str(conf / "plugins"), SETTINGS.split())


def write_images(folder: Path) -> None:
    """Write test images of the shards in `folder` as images/CLASS/NUMBER.png."""
    images = ShardedDataset(folder / "data/shards", "test")
    for row in range(IMAGES):
        image, label, _ = images.read(row)
        path = folder / f"images/{images.classes[label]}/{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def make_repository(folder: Path) -> None:
    """A new repository of git and DVC in which the pipeline can run."""
    make_inputs(folder)
    for name in CODE:
        source, path = REPOSITORY / name, folder / name
        path.parent.mkdir(exist_ok=True)
        shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
    commit = ["-c", "user.name=kills", "-c", "user.email=kills@example.org", "commit", "-qm", "inputs"]
    for command in (["init", "-q"], ["add", "-A"], commit):
        subprocess.run(["git", *command], cwd=folder, check=True)


def shares(kills: int, seconds: Mapping[str, float]) -> dict[str, int]:
    """`kills` divided among commands in proportion to their seconds, with at least FEW each if there are enough."""
    few = min(FEW, kills // len(seconds)) if seconds else 0
    rest, total = kills - few * len(seconds), sum(seconds.values())
    quota = {name: few + int(rest * each / total) for name, each in seconds.items()}
    for name in list(quota)[: kills - sum(quota.values())]:
        quota[name] += 1
    return quota


def run_undisturbed(folder: Path, commands: Collection[Command]) -> dict[str, float]:
    """Run commands in the new `folder`; returns the seconds of each."""
    place, seconds = Place(folder), {}
    make_inputs(folder)
    for command in commands:
        if command.name == "rrcm certify":
            write_images(folder)
        seconds[command.name] = place.run(command)
    if left := [name for name in contents(folder) if name.startswith("runs/") or name.endswith(".tmp")]:
        raise RRCMError(f"undisturbed runs leave {', '.join(left[:SHOWN])} in {folder}")
    return seconds


def disturb(root: Path, kills: int, seed: int, chosen: Collection[Command]) -> dict[str, Tally]:
    """Disturb the chosen commands in new folders of `root`; returns what happened to each, by name."""
    undisturbed, stages = root / "undisturbed", [command for command in chosen if command != PIPELINE]
    of_pipeline = 0 if PIPELINE not in chosen else round(PIPELINE_SHARE * kills) if stages else kills
    needed = STAGES if of_pipeline else STAGES[: STAGES.index(stages[-1]) + 1]
    print(f"{len(needed)} commands undisturbed, in {root}", file=sys.stderr)
    seconds = run_undisturbed(undisturbed, needed)
    expected, tallies = contents(undisturbed), {}
    quota = shares(kills - of_pipeline, {command.name: seconds[command.name] for command in stages})
    with Progress(kills, "kills", "kills") as progress:
        for command in stages:
            place = Place(root / command.name.replace(" ", "-"))
            shutil.copytree(undisturbed, place.folder)
            disturbance = Disturbance(command, place, expected, seed)
            tallies[command.name] = disturbance.run(quota[command.name], seconds[command.name], progress)
        if of_pipeline:
            place = Place(root / "pipeline")
            make_repository(place.folder)
            takes = place.run(PIPELINE)
            disturbance = PipelineDisturbance(PIPELINE, place, {}, seed)
            disturbance.expected = disturbance.contents()
            pair = (below(each, *RESULTS) for each in (expected, disturbance.expected))
            disturbance.tally.lost += differences(*pair)
            tallies[PIPELINE.name] = disturbance.run(of_pipeline, takes, progress)
    return tallies


def summary(tallies: Mapping[str, Tally]) -> str:
    """A table with a row per command and one for all."""
    columns = ["kills", "starts", "new interpreters", "from saved state", "finished", "identical"]
    rows = [
        [name, each.kills, each.starts, each.cold, each.resumed, each.finished, each.identical]
        for name, each in tallies.items()
    ]
    rows.append(["all", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True))])
    return tabulate(rows, ["", *columns], tablefmt="github")


def measure(
    kills: Annotated[int, typer.Option(min=1, help="Kills of all commands together.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed for the times of the kills.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Kill only this command. Repeat for several.")] = None,
) -> None:
    """Kill processes and print what happened to each command. Exit status 1 if anything was lost."""
    start, commands = time.monotonic(), [*STAGES, PIPELINE]
    names = [command.name for command in commands]
    if unknown := set(only or []) - set(names):
        raise RRCMError(f"--only {unknown.pop()!r}: must be one of {', '.join(names)}")
    server.set_forkserver_preload(PRELOAD.split())
    server.Process(target=int).start()  # starts the server, so that its imports do not count for the first command
    root = Path(tempfile.mkdtemp(prefix="rrcm-kills-")).resolve()
    try:
        tallies = disturb(root, kills, seed, [each for each in commands if each.name in (only or names)])
        lost = {name: tally.lost for name, tally in tallies.items() if tally.lost}
    except KeyboardInterrupt:
        shutil.rmtree(root, ignore_errors=True)
        raise
    print(summary(tallies))
    if victims := tallies.get(PIPELINE.name, Tally()).victims:
        print(f"\n{PIPELINE.name}: killed " + ", ".join(f"{name} {count}" for name, count in victims.items()))
    for name, lines in lost.items():
        print(*(f"{name}: {line}" for line in lines[:SHOWN]), sep="\n", file=sys.stderr)
    kills = sum(tally.kills for tally in tallies.values())
    print(f"\n{len(lost)} lost, {kills} kills, {time.monotonic() - start:.0f} s")
    if lost:
        raise RRCMError(f"{', '.join(lost)}: see above; the folders are in {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    resume_gc()
    app = make_app()
    app.command()(exit_on_error(measure))
    app()
