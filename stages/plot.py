"""Write the report of a run: figures and tables in reports/NAME, and metrics.json."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.config import load_config
from rrcm.report.build import write_report


def plot(
    params: Path = Path("params.yaml"), reports: Path = Path("reports"), metrics: Path = Path("metrics.json")
) -> None:
    """Write the report and the metrics from the certificates, histories and timings of the run."""
    config = load_config(params)
    write_report(config, Path(), reports / config.report.name, metrics)


if __name__ == "__main__":
    run_command(plot)
