"""What pre-trainings did to the representations of held-out images, side by side: how still they are under noise.

Reads the representation.csv that pre-training leaves: means over the folders given under one name (seeds), and their
range. `untrained` is the network that all of them start from.

    for seed in 0 1 2; do for objective in rrcm moco_noise; do
        python stages/compose.py seed=$seed pretrain.objective=$objective --output $objective-$seed.yaml
        python stages/shard_data.py --params $objective-$seed.yaml --output build/shards-$seed
        python stages/pretrain.py --params $objective-$seed.yaml --shards build/shards-$seed \\
            --output build/$objective-$seed --timing build/t.json
    done; done
    python benchmarks/trajectories.py rRCM=build/rrcm-0 rRCM=build/rrcm-1 rRCM=build/rrcm-2 \\
        "MoCo-v3 with noise=build/moco_noise-0" ... --figure trajectories.png
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from matplotlib.figure import Figure
from tabulate import tabulate

from rrcm.utils.app import exit_on_error, make_app, resume_gc
from rrcm.report.figures import OKABE_ITO, figure_style, save
from rrcm.utils.errors import RRCMError

MEASURES = {
    "centred": "the same image, centred",
    "cosine": "the same image",
    "similarity": "other images",
    "knn": "k-NN accuracy",
}
BEFORE = "untrained"

resume_gc()


def read_looks(folders: list[str]) -> pd.DataFrame:
    """A row for each first and last look, noise and folder: name, sigma and the measures. Raises `RRCMError`."""
    looks = []
    for text in folders:
        name, _, folder = text.partition("=")
        path = Path(folder) / "representation.csv"
        if not (folder and path.is_file()):
            raise RRCMError(f"{text!r}: must be NAME=FOLDER, with {path.name} of a pre-training in the folder")
        frame = pd.read_csv(path).query("sigma > 0")
        looks.append(frame[frame["step"] == 0].assign(name=BEFORE, folder=folder))
        looks.append(frame[frame["step"] == frame["step"].max()].assign(name=name, folder=folder))
    return pd.concat(looks).drop_duplicates(["name", "sigma", *MEASURES])


@figure_style()
def draw(looks: pd.DataFrame) -> Figure:
    """A panel a measure; a line a name over sigma, the range over its folders as a bar. Centred: each level's mean
    representation taken off."""
    figure = Figure(figsize=(8.7, 2.9))
    colours = ["#808080", *OKABE_ITO]
    for axes, (measure, title) in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES.items(), strict=True):
        for name, colour, marker in zip(looks["name"].unique(), colours, "so^Dv", strict=False):
            by_sigma = looks[looks["name"] == name].groupby("sigma")[measure]
            mean = by_sigma.mean()
            error = [mean - by_sigma.min(), by_sigma.max() - mean]
            dashes = ":" if name == BEFORE else "-"
            axes.errorbar(mean.index, mean, error, color=colour, marker=marker, linestyle=dashes, capsize=2, label=name)
        axes.set(title=title, xlabel="σ (pixels in [0, 1])", xticks=sorted(looks["sigma"].unique()), ylim=(0, 1.02))
    first = figure.axes[0]
    first.set_ylabel("mean cosine to $t_{min}$; accuracy")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main(
    folders: Annotated[list[str], typer.Argument(help="NAME=FOLDER of a pre-training; a name may come more than once")],
    figure: Annotated[Path | None, typer.Option(help=".png or .svg")] = None,
) -> None:
    """Print the measures of each pre-training, and draw them."""
    looks = read_looks(folders)
    rows = []
    for (name, sigma), group in looks.groupby(["name", "sigma"], sort=False):
        spread = [f"{group[m].mean():.3f} ({group[m].min():.3f} - {group[m].max():.3f})" for m in MEASURES]
        rows.append([name, f"{sigma:g}", len(group), *spread])
    print(tabulate(rows, ["", "sigma", "runs", *MEASURES], tablefmt="github", disable_numparse=True))
    if figure is not None:
        save(draw(looks), figure)


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
