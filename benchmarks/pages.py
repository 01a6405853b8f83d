"""Bytes of the page of a report and seconds to draw it, for invented runs of different sizes.

    python benchmarks/pages.py default all many

The runs are those of the tests (tests/report/invented_run.py): invented votes, so no training. `default` has the
methods, images and sigmas of the default run, `all` every method that the preset `all` has, and `many` 40 methods on
the 10,000 test images of Fashion-MNIST.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml
from tabulate import tabulate

from rrcm.utils.app import exit_on_error, make_app
from rrcm.methods import METHODS
from rrcm.utils.errors import RRCMError

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/report")]

from invented_run import make_config, make_inputs, write_report  # noqa: E402

MANY = 40
FASHION_MNIST = {"source": "fashion_mnist", "image_size": 28, "shard_size": 4096, "val_fraction": 0.04}
RUNS = ("default", "all", "many")


def settings(name: str) -> dict[str, object]:
    """The settings of an invented run that differ from the tests' own. Raises `RRCMError` for another name."""
    defaults = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    plain = [method for method, row in METHODS.items() if not row.denoises]
    if name == "default":
        methods = [method for method in defaults["methods"] if method in plain]
    elif name == "all":
        preset = yaml.safe_load((ROOT / "conf/preset/all.yaml").read_text(encoding="utf-8"))
        methods = [method for method in preset["methods"] if method in plain]
    elif name == "many":
        methods = [method for method in plain if METHODS[method].initial_weights in (None, "rrcm")]
        methods = [method for method in methods if not METHODS[method].can_pass and not METHODS[method].is_ensemble]
        data, certify = defaults["data"] | FASHION_MNIST, defaults["certify"] | {"every": 1}
        return {"methods": methods[:MANY], "data": data, "certify": certify, "sigmas": defaults["sigmas"]}
    else:
        raise RRCMError(f"{name!r}: must be one of {', '.join(RUNS)}")
    return {"methods": methods, "sigmas": defaults["sigmas"]}


def measure(name: str) -> tuple[str, int, int, int, float]:
    """Methods, images and bytes of the page of an invented run, and the process's seconds to draw its report."""
    config = make_config([], **settings(name))
    with tempfile.TemporaryDirectory(prefix="rrcm_") as folder:
        make_inputs(config, Path(folder))
        first = next(Path(folder).glob("certificates/*/*.samples.tsv"))
        images = sum(1 for _ in first.open(encoding="utf-8")) - 1
        start = time.process_time()
        write_report(config, Path(folder), Path(folder) / "report")
        seconds = time.process_time() - start
        return name, len(config.methods), images, (Path(folder) / "report/index.html").stat().st_size, seconds


def main(runs: Annotated[list[str], typer.Argument(help=", ".join(RUNS))]) -> None:
    table = [measure(name) for name in runs]
    print(tabulate(table, ["run", "methods", "images", "bytes", "CPU seconds"], "github", intfmt=",", floatfmt=".0f"))


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
