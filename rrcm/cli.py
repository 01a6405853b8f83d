"""The console command `rrcm`. What takes long to import is imported when a command runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rrcm.utils.app import exit_on_error, make_app, resume_gc, run_app
from rrcm.utils.errors import RRCMError

app = make_app()


@app.callback()
def rrcm() -> None:
    """Certified image classifiers by randomized smoothing."""


@app.command()
@exit_on_error
def certify(
    folder: Annotated[Path, typer.Argument(help="Images, in it or below.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|FILE|NAME",
            help="A folder with model.safetensors and config.json, a fine-tuned checkpoint of the rRCM authors, or a "
            "name of timm's.",
        ),
    ],
    sigma: Annotated[
        float | None,
        typer.Option(help="Noise, in pixel units (pixels in [0, 1]). Default: what a model folder was tuned for."),
    ] = None,
    stopping: Annotated[
        str, typer.Option(metavar="sequential|fixed", help="Stop an image when more samples gain nothing, or never.")
    ] = "sequential",
    n: Annotated[int, typer.Option(help="Noisy samples an image, at most.")] = 100_000,
    n0: Annotated[int, typer.Option(help="Samples that choose the class.")] = 100,
    alpha: Annotated[float, typer.Option(help="Chance that a certificate is wrong, at most.")] = 0.001,
    radius_step: Annotated[float, typer.Option(help="Sequential: radii are multiples of this, in pixel units.")] = 0.25,
    precision: Annotated[str, typer.Option(metavar="auto|fp32|bf16", help="What the network computes in.")] = "fp32",
    batch_size: Annotated[int | None, typer.Option(help="Samples a forward pass. Default: found by itself.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    limit: Annotated[int | None, typer.Option(help="The first so many images. Default: all.")] = None,
    classes: Annotated[Path | None, typer.Option(help="A text file, a class name a line, in order.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Of a timm model: a safetensors file, instead of a download.")
    ] = None,
    final_norm: Annotated[
        bool, typer.Option(help="Of a checkpoint of the authors: their CIFAR-10 models skip the last LayerNorm.")
    ] = True,
    output: Annotated[Path, typer.Option(help="Certificates: idx, label, predict, radius, correct, time.")] = Path(
        "certificates.tsv"
    ),
    sheet: Annotated[Path, typer.Option(help="Picture of the images with their radii, .png or .svg.")] = Path(
        "sheet.png"
    ),
) -> None:
    """Certify the images of FOLDER: the class of each, and the L2 radius within which nothing can change it."""
    from rrcm.certification.certify_images import certify_folder, find_images
    from rrcm.certification.stopping import make_stopping_rule
    from rrcm.models.load import load_base_classifier

    resume_gc()
    find_images(folder)  # complains before a model is downloaded
    subject = load_base_classifier(model, sigma=sigma, weights=weights, final_norm=final_norm, classes=classes)
    if sigma is None and subject.sigma is None:
        raise RRCMError(f"{model}: any noise may be certified with; give --sigma, in pixel units")
    noise = subject.sigma if sigma is None else sigma
    plan = make_stopping_rule(stopping, noise, n0=n0, n=n, alpha=alpha, radius_step=radius_step)
    if subject.sigma not in (None, noise):
        print(
            f"note: {model} was tuned for sigma {subject.sigma:g}; certificates at {noise:g} are as sound, but "
            "may be smaller and fewer",
            file=sys.stderr,
        )
    print(
        certify_folder(
            folder,
            subject,
            plan,
            output=output,
            sheet=sheet,
            limit=limit,
            seed=seed,
            precision=precision,
            batch_size=batch_size,
            device=device,
        )
    )


@app.command()
@exit_on_error
def compare(
    files: Annotated[
        list[str], typer.Argument(metavar="NAME=FILE...", help="A name for the legend, and a file.", show_default=False)
    ],
    radii: Annotated[
        str, typer.Option(help="Radii of the table, in pixel units.")
    ] = "0,0.25,0.5,0.75,1,1.25,1.5,1.75,2",
    output: Annotated[Path, typer.Option(help="Picture of the exact curves, .png or .svg.")] = Path("compare.png"),
) -> None:
    """Compare certificates of any groups (idx, label, predict, radius, correct, time): ACR and certified accuracy."""
    from rrcm.report.compare import compare as draw

    resume_gc()
    draw(files, radii, output)


def main() -> None:
    """The console command."""
    run_app(app)


if __name__ == "__main__":
    main()
