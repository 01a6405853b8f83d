"""Attack the smoothed and unsmoothed classifiers of one method, and its cascade: attack/METHOD."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.config import load_config
from rrcm.evaluation.attack import attack_method, summary_line, write_results
from rrcm.report.accuracy_figures import draw_attack
from rrcm.report.figures import save_all
from rrcm.utils.files import atomic_directory


def main(
    method: str,
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    models: Path = Path("models"),
    certificates: Path = Path("certificates"),
    attacks: Path = Path("attack"),
) -> None:
    """Attack METHOD just inside each certified radius and at the report's radii."""
    config, output = load_config(params), attacks / method
    results = attack_method(config, method, shards, models / method, certificates / method)
    with atomic_directory(output) as folder:
        write_results(folder, method, results)
        save_all({"attack": draw_attack(method, results.tables, results.radii, results.summaries)}, folder)
    print(summary_line(output, results.totals, config.certify.alpha), file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
