"""Compare pre-training runs by their representations of held-out images: cosines along a noise trajectory and k-NN.

Reads the representation.csv of each run. Folders with the same name are different seeds: the table and the figure show
their mean and range. `untrained` is the network before the first step.

    mkdir -p build
    for seed in 0 1 2; do
        python stages/compose.py seed=$seed 'pretrain.objectives=[rrcm,rrcm_without_consistency]' \\
            --output build/seed-$seed.yaml
        python stages/shard_data.py --params build/seed-$seed.yaml --output build/shards-$seed
        for objective in rrcm rrcm_without_consistency; do
            python stages/pretrain.py $objective --params build/seed-$seed.yaml --shards build/shards-$seed \\
                --models build/models-$seed --timings build/timings-$seed
        done
    done
    python benchmarks/trajectories.py rRCM=build/models-0/rrcm rRCM=build/models-1/rrcm rRCM=build/models-2/rrcm \\
        "without consistency=build/models-0/rrcm_without_consistency" ... --figure trajectories.png
"""

from itertools import cycle
from pathlib import Path
from typing import Annotated

from rrcm.report.figures import OKABE_ITO, figure_style, save  # first: with it matplotlib takes any MPLBACKEND

# isort: split
import pandas as pd
import typer
from matplotlib.figure import Figure
from tabulate import tabulate

from rrcm.utils.app import exit_on_error, make_app, resume_gc
from rrcm.utils.errors import RRCMError

MEASURES = {
    "centred_cosine": "cosine, same image, centred",
    "same_image_cosine": "cosine, same image",
    "cross_image_cosine": "cosine, other images",
    "knn": "k-NN accuracy",
}
UNTRAINED = "untrained"

resume_gc()


def read_representations(folders: list[str]) -> pd.DataFrame:
    """The first and the last evaluation in each of `folders` (NAME=FOLDER), with the columns of `MEASURES`.

    One row per name, folder and sigma > 0; the first evaluation has the name `untrained`. Raises `RRCMError` if a
    folder has no representation.csv.
    """
    rows = []
    for text in folders:
        name, _, folder = text.partition("=")
        path = Path(folder) / "representation.csv"
        if not (folder and path.is_file()):
            raise RRCMError(
                f"{text!r}: must be NAME=FOLDER, the folder of a pre-training run that contains {path.name}"
            )
        frame = pd.read_csv(path).query("sigma > 0")
        rows.append(frame[frame["step"] == 0].assign(name=UNTRAINED, folder=folder))
        rows.append(frame[frame["step"] == frame["step"].max()].assign(name=name, folder=folder))
    return pd.concat(rows).drop_duplicates(["name", "sigma", *MEASURES])


@figure_style()
def draw(rows: pd.DataFrame) -> Figure:
    """One panel per measure with one line per name over sigma. Bars show the range over the folders of a name."""
    figure = Figure(figsize=(8.7, 2.9))
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for name, colour, marker in zip(rows["name"].unique(), cycle(["#808080", *OKABE_ITO]), cycle("so^Dv")):
            by_sigma = rows[rows["name"] == name].groupby("sigma")[measure]
            mean = by_sigma.mean()
            error = [mean - by_sigma.min(), by_sigma.max() - mean]
            dashes = ":" if name == UNTRAINED else "-"
            axes.errorbar(mean.index, mean, error, color=colour, marker=marker, linestyle=dashes, capsize=2, label=name)
        axes.set(title=title, xlabel="σ (pixels in [0, 1])", xticks=sorted(rows["sigma"].unique()), ylim=(0, 1.02))
    panels[0].set_ylabel("mean cosine, or accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main(
    folders: Annotated[list[str], typer.Argument(help="NAME=FOLDER of each pre-training run; seeds share a name")],
    figure: Annotated[Path | None, typer.Option(help="also draw this .png or .svg file")] = None,
) -> None:
    """Print the measures of each pre-training run, and draw them with --figure."""
    rows, lines = read_representations(folders), []
    for (name, sigma), group in rows.groupby(["name", "sigma"], sort=False):
        ranges = [f"{group[m].mean():.3f} ({group[m].min():.3f} - {group[m].max():.3f})" for m in MEASURES]
        lines.append([name, f"{sigma:g}", len(group), *ranges])
    print(tabulate(lines, ["", "sigma", "runs", *MEASURES], tablefmt="github", disable_numparse=True))
    if figure is not None:
        save(draw(rows), figure)


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
