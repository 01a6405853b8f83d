"""What `--estimate` says, and how long the command then takes: ten commands of different kinds.

    dvc pull results/digits/seed_0/run.dvc results/fashion_mnist/seed_0/run.dvc
    python benchmarks/estimates.py WORK

Pictures are drawn into WORK, and the networks are those of published results. Seconds are of the clock, from the start
of a command to its end; other work on the machine makes them larger. A table in WORK keeps the rows, so that a script
that was stopped continues. The ratio is that of the seconds to the estimate.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from rrcm.utils.app import exit_on_error, make_app
from rrcm.data.shards import ShardedDataset
from rrcm.utils.errors import RRCMError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/own_images"))

from pictures import write_pictures  # noqa: E402

RUNS = {name: ROOT / f"results/{name}/seed_0/run" for name in ("digits", "fashion_mnist")}
EXPERT = RUNS["digits"] / "models/rrcm/sigma_0.5"
JOINT = RUNS["digits"] / "models/rrcm_joint/joint"
CNN = RUNS["fashion_mnist"] / "models/smoothadv_matched_joint/joint"
CASCADE = "--cascade --sigma 0.25 --sigma 0.5 --sigma 1"
COMMANDS = {  # what it is, and its arguments, which name folders of images in WORK
    "certify, one sigma": f"certify digits --model {EXPERT} --n 20000 --limit 30",
    "certify, margin bound": f"certify digits --model {EXPERT} --n 20000 --limit 30 --bound margin",
    "certify, coarse radii": f"certify digits --model {EXPERT} --radius-step 0.25 --limit 100",
    "certify, all samples": f"certify digits --model {EXPERT} --stopping fixed --n 5000 --limit 40",
    "certify, joint network": f"certify digits --model {JOINT} --sigma 0.25 --n 20000 --limit 30",
    "certify, cascade": f"certify digits --model {JOINT} {CASCADE} --n 10000 --limit 20",
    "certify, CNN": f"certify clothes --model {CNN} --sigma 0.5 --n 10000 --limit 20",
    "predict": f"predict digits --model {EXPERT} --n 2000 --output p.csv",
    "train, 60 pictures": "train few --hours 0.05 --output trained_few",
    "train, 400 pictures": "train some --hours 0.067 --output trained_some",
}
UNITS = {"s": 1, "min": 60, "minutes": 60, "h": 3600, "d": 86400}


def prepare(work: Path) -> None:
    """Write the folders of images that the commands name. Raises `RRCMError` if a published run is not here."""
    work.mkdir(parents=True, exist_ok=True)
    for name, (folder, count) in {"digits": ("digits", 120), "fashion_mnist": ("clothes", 100)}.items():
        if not RUNS[name].exists():
            raise RRCMError(
                f"{RUNS[name].relative_to(ROOT)}: not here; run `dvc pull {RUNS[name].relative_to(ROOT)}.dvc`"
            )
        if not (work / folder).exists():
            (work / folder).mkdir()
            images = ShardedDataset(RUNS[name] / "data/shards", "test")
            for i in np.linspace(0, len(images) - 1, count, dtype=int).tolist():
                images.read(i)[0].save(work / folder / f"{i}.png")
    for folder, counts in {"few": (15,) * 4, "some": (100,) * 4}.items():
        if not (work / folder).exists():
            write_pictures(work / folder, counts)


def read_estimate(said: str) -> float:
    """The seconds of a line such as `about 1 min 5 s for 9 images` or `estimate  3.1 minutes: training 2.0`."""
    for line in said.splitlines():
        if match := re.match(r"(?:about |estimate +)?((?:[\d.]+ (?:s|min|minutes|h|d) ?)+)(?:for |: |$)", line):
            return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+) (\w+)", match[1]))
    raise RRCMError(f"no estimate in {said!r}")


def run(work: Path, arguments: str, *more: str) -> tuple[str, float]:
    """What `rrcm` prints, and its seconds. Raises `RRCMError` if it fails."""
    start = time.monotonic()
    command = [sys.executable, "-m", "rrcm.cli", *arguments.split(), *more]
    answer = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if answer.returncode:
        raise RRCMError(f"rrcm {arguments}: {answer.stderr.splitlines()[-1]}")
    return answer.stdout, time.monotonic() - start


def measure(work: Path, arguments: str) -> tuple[float, float]:
    """The estimate for a command, and the seconds that it then took."""
    if arguments.startswith("train"):
        shutil.rmtree(work / arguments.split()[-1], ignore_errors=True)  # of a training that was stopped
        said, seconds = run(work, arguments)  # `rrcm train` says it before it starts
        return read_estimate(said), seconds
    said, _ = run(work, arguments, "--estimate")
    return read_estimate(said), run(work, arguments)[1]


def main(work: Path) -> None:
    prepare(work)
    path = work / "estimates.csv"
    for name, arguments in COMMANDS.items():
        rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["command"])
        if name in set(rows["command"]):
            continue
        estimate, seconds = measure(work, arguments)
        row = pd.DataFrame([{"command": name, "estimate": estimate, "seconds": seconds, "ratio": seconds / estimate}])
        pd.concat([rows, row] if len(rows) else [row]).to_csv(path, index=False)
        for left in work.glob("certificates*"):
            left.unlink()
    rows = pd.read_csv(path)
    print(tabulate(rows, list(rows), "github", floatfmt=("", ".0f", ".0f", ".2f"), showindex=False))


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
