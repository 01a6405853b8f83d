"""The console command `rrcm`. Modules that take long to import are imported when a command runs."""

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from rrcm.utils.app import exit_on_error, make_app, other_checkout, resume_gc, run_app
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import check_output

app = make_app()


@app.callback()
def rrcm() -> None:
    """Certified image classifiers by randomized smoothing."""


@app.command()
@exit_on_error
def certify(  # long because each option has its own lines
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder with images, subfolders included.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|FILE|NAME",
            help="A model folder, a fine-tuned checkpoint of the rRCM authors, or a timm model: its name, "
            "hf-hub:owner/name, or a snapshot folder.",
        ),
    ],
    sigma: Annotated[
        float | None,
        typer.Option(help="Noise in pixel units (pixels in [0, 1]). Default: what the model was trained for."),
    ] = None,
    stopping: Annotated[
        str,
        typer.Option(
            metavar="sequential|fixed", help="Stop as soon as the radius is decided, or always draw all samples."
        ),
    ] = "sequential",
    bound: Annotated[
        str,
        typer.Option(
            metavar="binary|margin",
            help="How to bound the runner-up: by what the top class leaves, as in all papers, or by its own votes. "
            "The second also certifies classes with less than half of the votes.",
        ),
    ] = "binary",
    n: Annotated[int, typer.Option(help="Maximum number of noisy samples per image.")] = 100_000,
    n0: Annotated[int, typer.Option(help="Samples that choose the class.")] = 100,
    alpha: Annotated[float, typer.Option(help="Maximum probability that a certificate is wrong.")] = 0.001,
    radius_step: Annotated[
        float, typer.Option(help="Sequential only: radii are multiples of this, in pixel units.")
    ] = 0.25,
    precision: Annotated[str, typer.Option(metavar="auto|fp32|bf16", help="Precision of the network.")] = "fp32",
    batch_size: Annotated[
        int | None, typer.Option(help="Noisy samples per forward pass. Default: chosen automatically.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or a GPU such as cuda:1.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Certify only N images, evenly spaced over the folder.")] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Go on without images that cannot be read.")
    ] = False,
    classes: Annotated[
        Path | None, typer.Option(help="Text file with one class name per line, in the model's order.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="File with the weights of a timm name, instead of a download.")
    ] = None,
    final_norm: Annotated[
        bool, typer.Option(help="Authors' checkpoints only: their CIFAR-10 models skip the last LayerNorm.")
    ] = True,
    output: Annotated[
        Path, typer.Option(help="Certificates (TSV): idx, label, predict, radius, correct, time (always 0).")
    ] = Path("certificates.tsv"),
    gallery: Annotated[Path, typer.Option(help="Figure of the images with classes and radii, .png or .svg.")] = Path(
        "gallery.png"
    ),
) -> None:
    """Certify the images of FOLDER: print and save each image's class and certified L2 radius, and draw a gallery.

    A run that is stopped continues when the same command is given again.
    """
    from rrcm.certification.certify_images import certify_folder, find_images, folder_files, output_paths, smooth
    from rrcm.certification.rules import make_stopping_rule
    from rrcm.data.images import describe_left_out
    from rrcm.models.load import load_base_classifier
    from rrcm.report.certified_images import certificate_summary, certificate_table, draw_gallery, note_on_labels
    from rrcm.report.figures import FORMATS, encode, note_on_letters
    from rrcm.utils.files import claimed, write_together

    resume_gc()  # this function is long only because of its options
    written = [*output_paths(output), gallery]
    _check_outputs(output_paths(output), gallery, FORMATS)
    images = find_images(folder, [gallery])  # fails before a model is downloaded
    if {(folder / file).resolve() for file in images.files} & {path.resolve() for path in written}:
        raise RRCMError(f"{output}: is one of the images; choose another path")
    if left_out := describe_left_out(images.left_out):
        print(f"note: left out {left_out}", file=sys.stderr)
    loaded = load_base_classifier(model, sigma=sigma, weights=weights, final_norm=final_norm, classes=classes)
    noise = loaded.sigma if sigma is None else sigma
    if noise is None:
        raise RRCMError(f"{model}: was not trained for a particular noise; give --sigma, in pixel units")
    settings = {"stopping": stopping, "bound": bound, "n0": n0, "n": n, "alpha": alpha, "radius_step": radius_step}
    rule = make_stopping_rule(sigma=noise, **settings)
    if loaded.sigma not in (None, noise):
        note = f"note: {model} was trained for sigma {loaded.sigma:g}; certificates at {noise:g} are valid"
        print(f"{note}, but may be smaller and fewer", file=sys.stderr)
    context.with_resource(claimed(*written))  # until the command ends
    smoothed = smooth(loaded, noise, device, seed=seed, precision=precision, batch_size=batch_size)
    found = certify_folder(images, loaded, smoothed, rule, output, limit=limit, skip_unreadable=skip_unreadable)
    picture = encode(draw_gallery(found, loaded, rule), gallery.suffix)
    write_together(folder_files(output, found, loaded, model, settings) | {gallery: picture})
    print(f"{certificate_table(found.frame)}\n\n{certificate_summary(found, rule)}")
    for note in (note_on_labels(found.frame), note_on_letters([*found.frame["file"], *found.frame["class"]])):
        if note:
            print(f"note: {note}", file=sys.stderr)
    print(f"written: {', '.join(map(str, written))}")
    found.run.finish()


def _check_outputs(outputs: Collection[Path], gallery: Path, formats: Collection[str]) -> None:
    """Raises `RRCMError` for output paths that cannot be written, before hours of computing."""
    for path in (*outputs, gallery):
        check_output(path)
    if gallery in outputs:
        raise RRCMError(f"{gallery}: is the path of both the certificates and the gallery; give two paths")
    if gallery.suffix not in formats:
        raise RRCMError(f"{gallery}: the gallery must end in {' or '.join(formats)}")


@app.command()
@exit_on_error
def compare(
    files: Annotated[
        list[str],
        typer.Argument(metavar="NAME=FILE...", help="Name for the legend and certificate file.", show_default=False),
    ],
    radii: Annotated[
        str, typer.Option(help="Radii of the table, in pixel units.")
    ] = "0,0.25,0.5,0.75,1,1.25,1.5,1.75,2",
    output: Annotated[Path, typer.Option(help="Figure of the exact curves, .png or .svg.")] = Path("compare.png"),
    reference: Annotated[
        str | None, typer.Option(help="A name. Print the differences to it on common images, with 95 % intervals.")
    ] = None,
) -> None:
    """Compare ACR and certified accuracy of certificate files (idx, label, predict, radius, correct, time)."""
    from rrcm.report.compare import compare as draw

    resume_gc()
    draw(files, radii, output, reference)


@app.command()
@exit_on_error
def audit(
    file: Annotated[Path, typer.Argument(help="Certificates (TSV) with the votes and the record beside them.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|FILE|NAME", help="The model. Default: ROOT/models/METHOD/sigma_S of a result."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of shards or pictures. Default: ROOT/shards or ROOT/data/shards of a result."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to vote again on, chosen at random.")] = 100,
    every_row: Annotated[bool, typer.Option("--all", help="Vote again on all rows.")] = False,
    seed: Annotated[int | None, typer.Option(help="Chooses the rows; default: random.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="fp32|bf16", help="Default: as published. fp32 is faster on old CPUs, and finds less."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: as published.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as published.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or a GPU such as cuda:1.")] = "auto",
) -> None:
    """Audit a certificate file: recompute its radii from its votes, and let the model vote again.

    The verdict is the last line. The exit status is 0 only if it is "verified".
    """
    import secrets
    import time

    from rrcm.certification.audit import audit_file, find_inputs, verdict
    from rrcm.certification.revote import Settings

    resume_gc()
    start = time.monotonic()
    seed = secrets.randbelow(2**31) if seed is None else seed
    print(f"rows are chosen with --seed {seed}", file=sys.stderr)
    found = audit_file(
        file,
        *find_inputs(file, model, images),
        rows=None if every_row else rows,
        seed=seed,
        settings=Settings(precision, batch_size, threads, device),
    )
    for problem in found.problems:
        print(f"  {printable(problem)}", file=sys.stderr)
    print(printable(verdict(file, found, time.monotonic() - start)))
    if found.problems:
        raise typer.Exit(1)


def main() -> None:
    """The console command. It runs the code that is installed, and says so in a checkout with other code."""
    if folder := other_checkout([Path.cwd(), *Path.cwd().parents]):
        code, folder = printable(Path(__file__).parents[1]), printable(folder)
        print(f"note: this is the rrcm of {code}; the code of {folder} does not run", file=sys.stderr)
    run_app(app)


if __name__ == "__main__":
    main()
